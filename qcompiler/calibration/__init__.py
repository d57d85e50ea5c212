"""Calibration: text runs block by block through the quantized prefix of a captured graph."""

from __future__ import annotations

from qcompiler.calibration.blocks import Block, Linear, cut_blocks
from qcompiler.calibration.runner import Calibration, CalibrationSettings, calibrate
from qcompiler.calibration.task import BlockQuantizer, BlockResult, BlockTask, Moments

__all__ = [
    "Block",
    "BlockQuantizer",
    "BlockResult",
    "BlockTask",
    "Calibration",
    "CalibrationSettings",
    "Linear",
    "Moments",
    "calibrate",
    "cut_blocks",
]
