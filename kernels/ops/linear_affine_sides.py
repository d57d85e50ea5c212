"""`qcompiler::linear_affine_sides`: `linear_affine` on weights whose scales and zeros are prepared for a GPU.

A group's scale s and offset o = (2^(bits−1) − zero)·s, both rounded to the
activations' dtype, stand in the lower and upper half of one int32, so that
w = (code − 2^(bits−1))·s + o takes one load of 4 bytes and no conversion.
Codes stay as the affine format stores them.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import (
    PLANES,
    block_width,
    dequantize_affine,
    num_groups,
    words_per_row,
)
from qcompiler.kernels.library import register_op

SCHEMA = (
    "linear_affine_sides(Tensor x, Tensor low, Tensor? high, Tensor sides, Tensor? bias, "
    "int bits, int group_size, int in_features) -> Tensor"
)


def sides_per_block(bits: int, group_size: int, in_features: int) -> int:
    """Groups that one block of the format's codes covers; 1 where a group is longer."""
    block = PLANES[bits] * block_width(bits, group_size, in_features)
    return max(1, block // group_size) if group_size else 1


def pack_sides(
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    check: bool = True,
) -> torch.Tensor:
    """Scales and offsets of every group, side by side in int32.

    Args:
        scales: [groups, out_features], as the affine format stores them.
        zeros: [groups, out_features].
        bits: Bits per code.
        group_size: Codes per group; 0 for one group per output channel.
        in_features: Columns of the weight.
        dtype: float16 or bfloat16, the activations'.
        check: Refuse what is not finite, which waits for the device.

    Returns:
        int32 [out_features, groups rounded up to whole blocks]; the rounding repeats the last group.

    Raises:
        InvalidInputError: Another dtype, or a scale or offset that is not finite in it.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInputError(f"Scales cannot be prepared for activations of {dtype}.")
    centre = 1 << (bits - 1)
    scale = scales.float().t()
    pair = torch.stack((scale, (centre - zeros.float().t()) * scale), dim=-1).to(dtype)
    if check and not pair.is_meta and not bool(torch.isfinite(pair).all()):
        raise InvalidInputError(
            f"A scale or offset of the weight is not finite as {dtype}.",
            hint="Run with bfloat16 activations.",
        )
    padding = -pair.shape[1] % sides_per_block(bits, group_size, in_features)
    if padding:
        pair = torch.cat((pair, pair[:, -1:].expand(-1, padding, -1)), dim=1)
    return pair.contiguous().view(torch.int32).squeeze(-1)


def unpack_sides(sides: torch.Tensor, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [groups, out_features] in `dtype`."""
    scale, offset = sides[:, :groups].contiguous().view(dtype).view(*sides[:, :groups].shape, 2).unbind(-1)
    return scale.t(), offset.t()


def check_linear_affine_sides(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
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
            f"linear_affine_sides: x has {x.shape[-1]} features, the weight takes {in_features}."
        )
    wanted = (low.shape[0], words_per_row(bits, group_size, in_features))
    for part, tensor in (("low", low), ("high", high)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise InvalidInputError(
                f"linear_affine_sides: {part} is {list(tensor.shape)}, not {list(wanted)}."
            )
    per_block = sides_per_block(bits, group_size, in_features)
    groups = -(-num_groups(group_size, in_features) // per_block) * per_block
    if tuple(sides.shape) != (low.shape[0], groups):
        raise InvalidInputError(
            f"linear_affine_sides: sides are {list(sides.shape)}, not {[low.shape[0], groups]}."
        )
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInputError(f"linear_affine_sides: x is {x.dtype}, not float16 or bfloat16.")


def linear_affine_sides_reference(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize to float32, multiply in float32, add the bias, cast once.

    Args:
        x: [..., in_features], float16 or bfloat16.
        low: int32 [out_features, words].
        high: int16 or uint8 [out_features, words] for 3, 5 and 6 bits, else None.
        sides: int32 [out_features, groups], see `pack_sides`; of x's dtype.
        bias: [out_features] or None.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64, 128, 256, or 0 for one group per output channel.
        in_features: K.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_affine_sides(x, low, high, sides, bits, group_size, in_features)
    scale, offset = unpack_sides(sides, num_groups(group_size, in_features), x.dtype)
    centre = torch.full_like(scale, 1 << (bits - 1), dtype=torch.float32)
    weight = dequantize_affine(low, high, scale.float(), centre, bits, group_size, in_features)
    repeats = group_size or in_features
    weight += offset.float().t().repeat_interleave(repeats, dim=1)[:, :in_features]
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_affine_sides_fake(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_affine_sides(x, low, high, sides, bits, group_size, in_features)
    return x.new_empty((*x.shape[:-1], low.shape[0]))


LINEAR_AFFINE_SIDES = register_op(
    SCHEMA,
    reference=linear_affine_sides_reference,
    fake=linear_affine_sides_fake,
    cuda="qcompiler.kernels.triton.linear.affine_sides:linear_affine_sides_triton",
)
