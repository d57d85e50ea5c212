"""`qcompiler::linear_affine`: y = x · Wᵀ + bias with W stored in the affine format (`formats/affine.py`)."""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import dequantize_affine, num_groups, words_per_row
from qcompiler.kernels.library import register_op

SCHEMA = (
    "linear_affine(Tensor x, Tensor low, Tensor? high, Tensor scales, Tensor zeros, Tensor? bias, "
    "int bits, int group_size, int in_features) -> Tensor"
)


def check_linear_affine(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    """Refuse arguments whose shapes do not fit together; shapes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    if x.shape[-1] != in_features:
        raise InvalidInputError(
            f"linear_affine: x has {x.shape[-1]} features, the weight takes {in_features}."
        )
    check_affine_tensors("linear_affine", low, high, scales, bits, group_size, in_features)


def check_affine_tensors(
    op: str,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    """Refuse stored tensors whose shapes are not those of one affine weight; `op` names the caller.

    Raises:
        InvalidInputError: Names the op and the argument.
    """
    wanted = (low.shape[0], words_per_row(bits, group_size, in_features))
    for part, tensor in (("low", low), ("high", high)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise InvalidInputError(f"{op}: {part} is {list(tensor.shape)}, not {list(wanted)}.")
    if (high is None) != (bits in (2, 4, 8)):
        raise InvalidInputError(f"{op}: {bits}-bit codes and high={'None' if high is None else 'given'}.")
    if tuple(scales.shape) != (num_groups(group_size, in_features), low.shape[0]):
        raise InvalidInputError(f"{op}: scales are {list(scales.shape)}.")


def linear_affine_reference(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize to float32, multiply in float32, add the bias, cast once.

    Args:
        x: [..., in_features], any floating dtype.
        low: int32 [out_features, words].
        high: int16 or uint8 [out_features, words] for 3, 5 and 6 bits, else None.
        scales: [groups, out_features].
        zeros: [groups, out_features].
        bias: [out_features] or None.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64, 128, 256, or 0 for one group per output channel.
        in_features: K.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_affine(x, low, high, scales, bits, group_size, in_features)
    weight = dequantize_affine(low, high, scales, zeros, bits, group_size, in_features)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def linear_affine_fake(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_affine(x, low, high, scales, bits, group_size, in_features)
    return x.new_empty((*x.shape[:-1], low.shape[0]))


LINEAR_AFFINE = register_op(
    SCHEMA,
    reference=linear_affine_reference,
    fake=linear_affine_fake,
    cuda="qcompiler.kernels.triton.linear.affine:linear_affine_triton",
)
