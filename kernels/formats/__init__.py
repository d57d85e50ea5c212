"""Storage formats: named tensors, pack, unpack, dequantize, exact bits."""

from __future__ import annotations

from qcompiler.kernels.formats.additive import ADDITIVE, AdditiveFormat, AdditiveSpec
from qcompiler.kernels.formats.affine import AFFINE, AffineFormat, AffineSpec
from qcompiler.kernels.formats.base import Format, TensorSpec, get_format, register_format

__all__ = [
    "ADDITIVE",
    "AFFINE",
    "AdditiveFormat",
    "AdditiveSpec",
    "AffineFormat",
    "AffineSpec",
    "Format",
    "TensorSpec",
    "get_format",
    "register_format",
]
