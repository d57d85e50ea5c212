"""`qcompiler::linear_body_tail`: y = x · Wᵀ + bias with W in the format of `formats/body_tail.py`."""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.body_tail import BodyTailSpec, dequantize_body_tail, tail_layout
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.linear_affine import check_affine_tensors

SCHEMA = (
    "linear_body_tail(Tensor x, Tensor low, Tensor? high, Tensor scales, Tensor zeros, Tensor tail, "
    "Tensor tail_scales, Tensor? bias, int bits, int group_size, float tail_fraction, "
    "int tail_bits, int in_features) -> Tensor"
)


def check_linear_body_tail(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    spec: BodyTailSpec,
    in_features: int,
) -> None:
    """Refuse arguments whose shapes do not fit together; shapes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    if x.shape[-1] != in_features:
        raise InvalidInputError(
            f"linear_body_tail: x has {x.shape[-1]} features, the weight takes {in_features}."
        )
    check_affine_tensors("linear_body_tail", low, high, scales, spec.bits, spec.group_size, in_features)
    blocks, slots, _ = tail_layout(spec, in_features)
    wanted = (blocks * slots, low.shape[0])
    if tuple(tail.shape) != wanted or tail.dtype != torch.int16:
        raise InvalidInputError(
            f"linear_body_tail: tail is {tail.dtype} {list(tail.shape)}, not torch.int16 {list(wanted)}."
        )
    if tuple(tail_scales.shape) != (low.shape[0],):
        raise InvalidInputError(
            f"linear_body_tail: tail_scales are {list(tail_scales.shape)}, not [{low.shape[0]}]."
        )


def linear_body_tail_reference(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tail_fraction: float,
    tail_bits: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize to float32, multiply in float32, add the bias, cast once.

    Args:
        x: [..., in_features], any floating dtype.
        low: int32 [out_features, words].
        high: int16 or uint8 [out_features, words] for 3, 5 and 6 bits, else None.
        scales: [groups, out_features].
        zeros: [groups, out_features].
        tail: int16 [slots, out_features].
        tail_scales: [out_features].
        bias: [out_features] or None.
        bits: 2, 3, 4, 5, 6 or 8, of the body.
        group_size: 16, 32, 64, 128, 256, or 0 for one group per output channel.
        tail_fraction: About how many of the weights are tail.
        tail_bits: 4 to 8, of a correction.
        in_features: K.

    Returns:
        [..., out_features] in x.dtype.
    """
    spec = BodyTailSpec(bits, group_size, tail_fraction, tail_bits)
    check_linear_body_tail(x, low, high, scales, tail, tail_scales, spec, in_features)
    weight = dequantize_body_tail(low, high, scales, zeros, tail, tail_scales, spec, in_features)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def linear_body_tail_fake(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tail_fraction: float,
    tail_bits: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    spec = BodyTailSpec(bits, group_size, tail_fraction, tail_bits)
    check_linear_body_tail(x, low, high, scales, tail, tail_scales, spec, in_features)
    return x.new_empty((*x.shape[:-1], low.shape[0]))


LINEAR_BODY_TAIL = register_op(
    SCHEMA,
    reference=linear_body_tail_reference,
    fake=linear_body_tail_fake,
    cuda="qcompiler.kernels.triton.linear.body_tail:linear_body_tail_triton",
)
