"""Checkpoints: config.json and safetensors, local or from the hub, read one parameter at a time."""

from __future__ import annotations

from qcompiler.checkpoint.config import load_config
from qcompiler.checkpoint.files import locate
from qcompiler.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "load_config", "locate"]
