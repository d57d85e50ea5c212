"""Capture: a transformers model becomes one FX graph over ragged tokens, on the meta device."""

from __future__ import annotations

from qcompiler.capture.export import CapturedModel, capture
from qcompiler.capture.source import ModelSource

__all__ = ["CapturedModel", "ModelSource", "capture"]
