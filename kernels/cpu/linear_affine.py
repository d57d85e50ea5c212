"""CPU forms of `linear_affine` on torch's own low-bit matmuls, and a dense one where those do not apply.

torch's kernels are fast only for bfloat16 activations and few tokens
(measured on one AVX-512 core, 2048 x 2048: int4 0.5 of a bf16 linear's time at
1 token, 0.9 at 4, 1.3 at 8). So each op may also hold the dense weight and
take it for more than `FEW_TOKENS` tokens; without it the op stays small and
slower than bf16 on long prompts.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.linear_affine_gated import register_gated

FEW_TOKENS = 4


def linear_affine_cpu_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales_and_zeros: torch.Tensor,
    dense: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """X · Wᵀ + bias with W = (code − 8)·scale + zero.

    Args:
        x: bfloat16 [..., in_features].
        packed: What `aten._convert_weight_to_int4pack_for_cpu` made of the codes: uint8 [N, in_features/2].
        scales_and_zeros: bfloat16 [groups, N, 2].
        dense: bfloat16 [N, in_features] for more than `FEW_TOKENS` tokens, or None.
        bias: [N] or None.
        group_size: 32, 64, 128 or 256.

    Returns:
        bfloat16 [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    if dense is not None and rows.shape[0] > FEW_TOKENS:
        y = torch.nn.functional.linear(rows, dense)
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), packed, group_size, scales_and_zeros
        )
    return _finish(y, bias, x)


def _int4_fake(x, packed, scales_and_zeros, dense, bias, group_size):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def linear_affine_cpu_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    dense: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """X · Wᵀ + bias with W = code·scale + offset, one scale and offset per output channel.

    The kernel gives scale·(code·x); the offset joins as offset·Σx, in float32.

    Args:
        x: bfloat16 [..., in_features].
        codes: int8 [N, in_features].
        scales: bfloat16 [N].
        offsets: float32 [N].
        dense: bfloat16 [N, in_features] for more than `FEW_TOKENS` tokens, or None.
        bias: [N] or None.

    Returns:
        bfloat16 [..., N].
    """
    rows = x.reshape(-1, x.shape[-1])
    if dense is not None and rows.shape[0] > FEW_TOKENS:
        y = torch.nn.functional.linear(rows, dense)
    else:
        y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), codes, scales).float()
        y.addcmul_(rows.float().sum(-1, keepdim=True), offsets)
    return _finish(y, bias, x)


def _int8_fake(x, codes, scales, offsets, dense, bias):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def linear_affine_cpu_dense(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """X · Wᵀ + bias with the weight [N, in_features] dequantized once, in x's dtype."""
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _dense_fake(x, dense, bias):
    return x.new_empty((*x.shape[:-1], dense.shape[0]))


def _finish(y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if bias is not None:
        y = y.float() + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def pack_int4(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Repack codes uint8 [N, K] below 16 with scales and zeros [N, groups] for `linear_affine_cpu_int4`."""
    if codes.shape[0] % 16:
        raise InvalidInputError(f"torch's int4 CPU kernel needs rows in sixteens, not {codes.shape[0]}.")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    scale = scales.float()
    offset = (8 - zeros.float()) * scale
    return packed, torch.stack((scale, offset), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()


LINEAR_AFFINE_CPU_INT4 = register_op(
    "linear_affine_cpu_int4(Tensor x, Tensor packed, Tensor scales_and_zeros, Tensor? dense, Tensor? bias, "
    "int group_size) -> Tensor",
    reference=linear_affine_cpu_int4,
    fake=_int4_fake,
)
LINEAR_AFFINE_CPU_INT8 = register_op(
    "linear_affine_cpu_int8(Tensor x, Tensor codes, Tensor scales, Tensor offsets, Tensor? dense, "
    "Tensor? bias) -> Tensor",
    reference=linear_affine_cpu_int8,
    fake=_int8_fake,
)
LINEAR_AFFINE_CPU_DENSE = register_op(
    "linear_affine_cpu_dense(Tensor x, Tensor dense, Tensor? bias) -> Tensor",
    reference=linear_affine_cpu_dense,
    fake=_dense_fake,
)
for _linear in (LINEAR_AFFINE_CPU_INT4, LINEAR_AFFINE_CPU_INT8, LINEAR_AFFINE_CPU_DENSE):
    register_gated(_linear)
