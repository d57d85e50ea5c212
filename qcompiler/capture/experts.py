"""The experts implementation that mixture-of-experts models are built with for capture.

Registered with transformers' `ExpertsInterface` under `IMPLEMENTATION`. Routed
rows are sorted by expert and each projection is one `qcompiler::grouped_linear`
over 3-D weights; shapes do not depend on the routing, so one graph serves every
batch. Everything stays row-wise in the tokens.
"""

from __future__ import annotations

from typing import Any

import torch

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.kernels.errors import UnsupportedModelError

IMPLEMENTATION = "qcompiler"


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; harmless when repeated."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    module: Any, hidden: torch.Tensor, expert_index: torch.Tensor, expert_weight: torch.Tensor
) -> torch.Tensor:
    """Routed experts: `sum_k weight[t, k] · expert[index[t, k]](hidden[t])`.

    Args:
        module: The experts module, with 3-D `gate_up_proj` (or `up_proj`) and `down_proj`.
        hidden: [T, hidden].
        expert_index: int [T, k], the experts of each token.
        expert_weight: [T, k], their weights.

    Returns:
        [T, hidden] in hidden's dtype.

    Raises:
        UnsupportedModelError: The experts are laid out in a way that we do not know.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(f"{type(module).__name__} is split over devices (expert parallel)")
    tokens, top_k = expert_index.shape
    experts = expert_index.reshape(-1)
    sorted_experts, order = torch.sort(experts, stable=True)
    rows = hidden[order // top_k]
    # cumulative ends: how many of the sorted rows belong to experts 0..e
    count = _num_experts(module)
    ends = torch.searchsorted(sorted_experts, torch.arange(count, device=hidden.device), right=True).to(
        torch.int32
    )

    has_gate = getattr(module, "has_gate", True)
    up = _grouped(module, rows, "gate_up_proj" if has_gate else "up_proj", ends)
    # _apply_gate is the model's own (gpt_oss clamps and interleaves); transformers' default splits in halves
    inner = module._apply_gate(up) if has_gate else module.act_fn(up)
    down = _grouped(module, inner, "down_proj", ends)
    if getattr(module, "has_post_expert_norm", False):
        down = module.post_expert_norm(down)
    weighted = down * expert_weight.reshape(-1)[order].unsqueeze(-1)
    # the inverse of a permutation is its argsort
    restored = weighted[torch.argsort(order)]
    return restored.reshape(tokens, top_k, -1).sum(dim=1).to(hidden.dtype)


def _num_experts(module: Any) -> int:
    return int(module.down_proj.shape[0])


def _grouped(module: Any, rows: torch.Tensor, name: str, ends: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    if weight.ndim != 3:
        raise UnsupportedModelError(
            f"{type(module).__name__}.{name} has shape {tuple(weight.shape)}, expected 3-D"
        )
    return torch.ops.qcompiler.grouped_linear(
        rows, weight, ends, bias, getattr(module, "is_transposed", False)
    )
