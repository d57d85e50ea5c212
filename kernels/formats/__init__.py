"""Storage formats: named tensors, pack, unpack, dequantize, exact bits."""

from __future__ import annotations

from qcompiler.kernels.formats.additive import ADDITIVE, AdditiveFormat, AdditiveSpec
from qcompiler.kernels.formats.affine import AFFINE, AffineFormat, AffineSpec
from qcompiler.kernels.formats.base import (
    EmbeddingFormat,
    Format,
    GroupedFormat,
    TensorSpec,
    expert_tensor_specs,
    get_format,
    register_format,
)
from qcompiler.kernels.formats.body_tail import BODY_TAIL, BodyTailFormat, BodyTailSpec
from qcompiler.kernels.formats.int8_channel import INT8_CHANNEL, Int8ChannelFormat, Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import LUT4, Lut4Format, Lut4Spec

__all__ = [
    "ADDITIVE",
    "AFFINE",
    "BODY_TAIL",
    "INT8_CHANNEL",
    "LUT4",
    "AdditiveFormat",
    "AdditiveSpec",
    "AffineFormat",
    "AffineSpec",
    "BodyTailFormat",
    "BodyTailSpec",
    "EmbeddingFormat",
    "Format",
    "GroupedFormat",
    "Int8ChannelFormat",
    "Int8ChannelSpec",
    "Lut4Format",
    "Lut4Spec",
    "TensorSpec",
    "expert_tensor_specs",
    "get_format",
    "register_format",
]
