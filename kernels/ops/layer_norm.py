"""LayerNorm over the last dimension: y = (x − mean) / sqrt(var + eps) · weight + bias, statistics in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qcompiler.kernels.library import register_op


def _reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    shape = (x.shape[-1],)
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
        return F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype).contiguous()
    return F.layer_norm(x, shape, weight, bias, eps).contiguous()


def _fake(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return x.new_empty(x.shape)


layer_norm = register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.norms:layer_norm",
)
