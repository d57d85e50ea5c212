"""AQLM: additive quantization with calibration text."""

from __future__ import annotations

from qcompiler.methods.aqlm.finetune import FinetuneSettings
from qcompiler.methods.aqlm.layer import LayerSettings
from qcompiler.methods.aqlm.method import AQLM

__all__ = ["AQLM", "FinetuneSettings", "LayerSettings"]
