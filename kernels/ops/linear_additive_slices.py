"""`qcompiler::linear_additive_slices`: `linear_additive` with one 16-bit codebook, prepared for a GPU.

The codebook is rounded to int8 with one scale, so that a quarter of it fits
the shared memory of a multiprocessor. That moves a codebook of normally
distributed values by about 1 % of their size, little beside what two bits a
weight lose. `codebooks` then holds the rounded values again, so that kernels
for few and for many tokens compute with one and the same weight.
"""

from __future__ import annotations

import math

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.linear_additive import check_linear_additive, linear_additive_reference

SCHEMA = (
    "linear_additive_slices(Tensor x, Tensor codes, Tensor codebooks, Tensor tables, Tensor table_scale, "
    "Tensor scales, Tensor rows, Tensor? bias, int bits, int in_features) -> Tensor"
)
_CLIPS = tuple(1 - i / 16 for i in range(12))


def pack_slices(codebooks: torch.Tensor) -> dict[str, torch.Tensor]:
    """Round a codebook to int8 and lay it out in slices of two values.

    Args:
        codebooks: float16 [1, 1, 65536, 8].

    Returns:
        `codebooks` float16 of the same shape, rounded; `tables` int8 [4, 65536, 2], values 2s and 2s + 1 of
        each codeword in slice s; `table_scale` float32 [1], so that codebooks = tables · table_scale,
        exactly where float16 has normal numbers.

    Raises:
        InvalidInputError: Another shape or dtype.
    """
    if tuple(codebooks.shape) != (1, 1, 65536, 8) or codebooks.dtype != torch.float16:
        raise InvalidInputError(
            f"Slices are made of one float16 codebook of 65536 codewords of 8 values, not "
            f"{codebooks.dtype} {list(codebooks.shape)}."
        )
    values = codebooks.float().view(-1, 8)
    largest = float(values.abs().max())
    best, scale = math.inf, 1.0
    for clip in _CLIPS if largest else ():
        tried = _short(clip * largest / 127)
        error = float((_round(values, tried) * tried - values).square().sum())
        if error < best:
            best, scale = error, tried
    codes = _round(values, scale)
    return {
        "codebooks": (codes * scale).to(torch.float16).view_as(codebooks),
        "tables": codes.to(torch.int8).view(-1, 4, 2).transpose(0, 1).contiguous(),
        "table_scale": torch.full((1,), scale, dtype=torch.float32, device=codebooks.device),
    }


def _round(values: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.round(values / scale).clamp_(-127, 127)


def _short(scale: float) -> float:
    """The next number up with 4 significant bits: times an int8 it is a float16."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 16) / 16, exponent)


def check_linear_additive_slices(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    tables: torch.Tensor,
    table_scale: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bits: int,
    in_features: int,
) -> None:
    """Refuse arguments whose shapes do not fit together; shapes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    check_linear_additive(x, codes, codebooks, scales, rows, bits, in_features)
    if tuple(codebooks.shape) != (1, 1, 65536, 8):
        raise InvalidInputError(f"linear_additive_slices: codebooks are {list(codebooks.shape)}.")
    if tuple(tables.shape) != (4, 65536, 2) or tables.dtype != torch.int8 or table_scale.numel() != 1:
        raise InvalidInputError(
            f"linear_additive_slices: tables are {tables.dtype} {list(tables.shape)} with "
            f"{table_scale.numel()} scales."
        )


def linear_additive_slices_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    tables: torch.Tensor,
    table_scale: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """`linear_additive` of the rounded codebook.

    Args:
        x: [..., in_features], any floating dtype.
        codes: int16 [out_features, columns], see `formats/additive.py`.
        codebooks: As `pack_slices` gives them, like `tables` and `table_scale`.
        tables: int8 [4, 65536, 2].
        table_scale: float32 [1].
        scales: float16 [out_features].
        rows: int32 [1].
        bias: [out_features] or None.
        bits: 16.
        in_features: K.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_additive_slices(x, codes, codebooks, tables, table_scale, scales, rows, bits, in_features)
    return linear_additive_reference(x, codes, codebooks, scales, rows, bias, bits, in_features)


def linear_additive_slices_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    tables: torch.Tensor,
    table_scale: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_additive_slices(x, codes, codebooks, tables, table_scale, scales, rows, bits, in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


LINEAR_ADDITIVE_SLICES = register_op(
    SCHEMA,
    reference=linear_additive_slices_reference,
    fake=linear_additive_slices_fake,
    cuda="qcompiler.kernels.triton.linear.additive:linear_additive_slices_triton",
)
