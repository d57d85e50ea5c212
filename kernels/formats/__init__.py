"""Storage formats: named tensors, pack, unpack, dequantize, exact bits."""

from __future__ import annotations

from qcompiler.kernels.formats.affine import AFFINE, AffineFormat, AffineSpec
from qcompiler.kernels.formats.base import Format, TensorSpec, get_format, register_format

__all__ = ["AFFINE", "AffineFormat", "AffineSpec", "Format", "TensorSpec", "get_format", "register_format"]
