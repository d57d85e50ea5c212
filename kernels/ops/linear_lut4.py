"""`qcompiler::linear_lut4`: y = x · Wᵀ + bias with W stored in the lut4 format (`formats/lut4.py`)."""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.lut4 import BLOCK_SIZES, QUANT_TYPES, dequantize_lut4
from qcompiler.kernels.library import register_op

SCHEMA = (
    "linear_lut4(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "Tensor? part_rows, Tensor? bias, str quant_type, int block_size, int in_features) -> Tensor"
)


def check_linear_lut4(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
    op: str = "linear_lut4",
) -> None:
    """Refuse arguments that do not fit together; shapes and dtypes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    if quant_type not in QUANT_TYPES or block_size not in BLOCK_SIZES:
        raise InvalidInputError(f"{op}: no table {quant_type!r} with blocks of {block_size}.")
    if x.shape[-1] != in_features:
        raise InvalidInputError(f"{op}: x has {x.shape[-1]} features, the weight takes {in_features}.")
    if codes.dim() != 2 or 2 * codes.shape[1] != in_features:
        raise InvalidInputError(f"{op}: codes are {list(codes.shape)}; in_features is {in_features}.")
    double = absmax.dtype == torch.uint8
    if (nested_absmax is not None, nested_offset is not None) != (double, double):
        raise InvalidInputError(f"{op}: uint8 absmax needs nested_absmax and nested_offset, float32 none.")
    crossing = in_features % block_size != 0
    if part_rows is None and (double or crossing):
        raise InvalidInputError(f"{op}: part_rows is missing.")
    parts = 1 if part_rows is None else part_rows.shape[0]
    if nested_offset is not None and tuple(nested_offset.shape) != (parts,):
        raise InvalidInputError(f"{op}: {parts} parts, but nested_offset is {list(nested_offset.shape)}.")
    if not crossing and tuple(absmax.shape) != (codes.shape[0], in_features // block_size):
        raise InvalidInputError(f"{op}: absmax is {list(absmax.shape)}.")


def linear_lut4_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize to float32, multiply in float32, add the bias, cast once.

    Args:
        x: [..., in_features], any floating dtype.
        codes: uint8 [out_features, in_features/2], the even element in the high nibble.
        absmax: float32, or uint8 codes of it; [out_features, in_features/block_size], or flat where blocks
            cross rows.
        nested_absmax: float32 [sum of ceil(blocks/256) over parts] with uint8 absmax, else None.
        nested_offset: float32 [parts] with uint8 absmax, else None.
        part_rows: int32 [parts], rows of the weights laid side by side; None where nothing depends on it.
        bias: [out_features] or None.
        quant_type: "nf4" or "fp4".
        block_size: Weights per absmax.
        in_features: K, even.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    weight = dequantize_lut4(
        codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def linear_lut4_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


LINEAR_LUT4 = register_op(
    SCHEMA,
    reference=linear_lut4_reference,
    fake=linear_lut4_fake,
    cuda="qcompiler.kernels.triton.linear.lut4:linear_lut4_triton",
)
