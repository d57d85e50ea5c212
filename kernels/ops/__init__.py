"""The `qcompiler::` ops. Importing this package registers them with torch."""

<<<<<<< HEAD
from qcompiler.kernels.ops import (
    attention,
    gated_activation,
    grouped_linear,
    kv_append,
    layer_norm,
    paged_attention,
    ragged_attention,
    rms_norm,
    rotary,
)

__all__ = [
    "attention",
    "gated_activation",
    "grouped_linear",
    "kv_append",
    "layer_norm",
    "paged_attention",
    "ragged_attention",
    "rms_norm",
    "rotary",
]
=======
from __future__ import annotations

from qcompiler.kernels.ops import linear_affine as linear_affine
>>>>>>> klin
