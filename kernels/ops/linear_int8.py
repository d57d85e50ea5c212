"""`qcompiler::linear_int8`: y = x · (codes · scales)ᵀ + bias, weight-only int8, one scale per channel."""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op

SCHEMA = "linear_int8(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor"


def check_linear_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, op: str = "linear_int8"
) -> None:
    """Refuse arguments that do not fit together; shapes and dtypes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise InvalidInputError(f"{op}: codes must be an int8 matrix, not {codes.dtype} {list(codes.shape)}.")
    if x.shape[-1] != codes.shape[1]:
        raise InvalidInputError(f"{op}: x has {x.shape[-1]} features, the weight takes {codes.shape[1]}.")
    if tuple(scales.shape) != (codes.shape[0],):
        raise InvalidInputError(f"{op}: scales are {list(scales.shape)}, not [{codes.shape[0]}].")


def linear_int8_reference(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply with the codes in float32, then by the scales, add the bias, cast once.

    Args:
        x: [..., in_features], any floating dtype.
        codes: int8 [out_features, in_features].
        scales: Floating point [out_features].
        bias: [out_features] or None.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_int8(x, codes, scales)
    y = torch.nn.functional.linear(x.float(), codes.float()) * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_int8_fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_int8(x, codes, scales)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


LINEAR_INT8 = register_op(
    SCHEMA,
    reference=linear_int8_reference,
    fake=linear_int8_fake,
    cuda="qcompiler.kernels.triton.linear.int8:linear_int8_triton",
    cpu="qcompiler.kernels.cpu.linear_int8:linear_int8_cpu",
)
