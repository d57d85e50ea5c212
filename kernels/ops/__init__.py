"""The `qcompiler::` ops. Importing this package registers them with torch."""

from qcompiler.kernels.ops import (
    attention,
    embedding_affine,
    gated_activation,
    grouped_linear,
    grouped_linear_affine,
    kv_append,
    layer_norm,
    linear_additive,
    linear_affine,
    linear_int8,
    linear_llm_int8,
    linear_lut4,
    paged_attention,
    ragged_attention,
    rms_norm,
    rotary,
)

__all__ = [
    "attention",
    "embedding_affine",
    "gated_activation",
    "grouped_linear",
    "grouped_linear_affine",
    "kv_append",
    "layer_norm",
    "linear_additive",
    "linear_affine",
    "linear_int8",
    "linear_llm_int8",
    "linear_lut4",
    "paged_attention",
    "ragged_attention",
    "rms_norm",
    "rotary",
]
