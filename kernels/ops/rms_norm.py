"""RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition.

    n(x) = x / sqrt(mean(x²) + eps)       y = n(x) · (offset + weight)

n is computed in fp32. Llama rounds n(x) to x.dtype before the multiply
(`cast_first`); Gemma multiplies in fp32 by 1 + weight and rounds last.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.library import register_op


def _normalise(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_first: bool
) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype).contiguous()
    if cast_first:
        factor = weight if offset == 0 else offset + weight
        return (normed.to(x.dtype) * factor).to(x.dtype).contiguous()
    return (normed * (offset + weight.float())).to(x.dtype).contiguous()


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_first: bool
) -> torch.Tensor:
    return _normalise(x, weight, eps, offset, cast_first)


def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x + residual).to(x.dtype).contiguous()
    return _normalise(total, weight, eps, offset, cast_first), total


def _rms_norm_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_first: bool
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


rms_norm = register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool cast_first) -> Tensor",
    reference=_rms_norm,
    fake=_rms_norm_fake,
    cuda="qcompiler.kernels.triton.norms:rms_norm",
)
add_rms_norm = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, bool cast_first) "
    "-> (Tensor, Tensor)",
    reference=_add_rms_norm,
    fake=_add_rms_norm_fake,
    cuda="qcompiler.kernels.triton.norms:add_rms_norm",
)
