"""`qcompiler::linear_additive`: y = x · Wᵀ + bias with W in additive codebooks (`formats/additive.py`)."""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import code_columns, code_dtype, dequantize_additive, num_groups
from qcompiler.kernels.library import register_op

SCHEMA = (
    "linear_additive(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor rows, Tensor? bias, "
    "int bits, int in_features) -> Tensor"
)


def check_linear_additive(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bits: int,
    in_features: int,
) -> None:
    """Refuse arguments whose shapes do not fit together; shapes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    if x.shape[-1] != in_features:
        raise InvalidInputError(
            f"linear_additive: x has {x.shape[-1]} features, the weight takes {in_features}."
        )
    if codebooks.dim() != 4 or codebooks.shape[2] != 1 << bits or codebooks.shape[0] != rows.shape[0]:
        raise InvalidInputError(
            f"linear_additive: codebooks are {list(codebooks.shape)} with {bits}-bit codes and "
            f"{rows.shape[0]} row counts."
        )
    wanted = code_columns(codebooks.shape[1], bits, num_groups(codebooks.shape[3], in_features))
    if codes.dim() != 2 or codes.shape[1] != wanted or codes.dtype != code_dtype(bits):
        raise InvalidInputError(
            f"linear_additive: codes are {codes.dtype} {list(codes.shape)}, rows of {wanted} "
            f"{code_dtype(bits)} are needed."
        )
    if tuple(scales.shape) != (codes.shape[0],):
        raise InvalidInputError(f"linear_additive: scales are {list(scales.shape)}, not [{codes.shape[0]}].")


def linear_additive_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize to float32, multiply in float32, add the bias, cast once.

    Args:
        x: [..., in_features], any floating dtype.
        codes: [out_features, columns], see `formats/additive.py`.
        codebooks: float16 [sets, M, 2^bits, group_size].
        scales: float16 [out_features].
        rows: int32 [sets], consecutive output rows of each set of codebooks.
        bias: [out_features] or None.
        bits: Bits per code.
        in_features: K.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_additive(x, codes, codebooks, scales, rows, bits, in_features)
    weight = dequantize_additive(codes, codebooks, scales, rows, bits, in_features)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def linear_additive_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_additive(x, codes, codebooks, scales, rows, bits, in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


LINEAR_ADDITIVE = register_op(
    SCHEMA,
    reference=linear_additive_reference,
    fake=linear_additive_fake,
    cuda="qcompiler.kernels.triton.linear.additive:linear_additive_triton",
)
