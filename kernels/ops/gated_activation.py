"""Gated activations of feed-forward blocks (Shazeer 2020): silu(gate) · up and gelu(gate) · up.

The reference rounds the activation to the input dtype before the multiply, as
eager models do, so replacing the pair changes nothing bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op


def check_approximate(approximate: str) -> None:
    """Raise `InvalidInputError` unless `approximate` is "none" or "tanh"."""
    if approximate not in ("none", "tanh"):
        raise InvalidInputError(
            f"gelu_mul: unknown approximation {approximate!r}", hint='Use "none" or "tanh".'
        )


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(gate) * up).contiguous()


def _gelu_mul(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    check_approximate(approximate)
    return (F.gelu(gate, approximate=approximate) * up).contiguous()


def _silu_mul_fake(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _gelu_mul_fake(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    check_approximate(approximate)
    return gate.new_empty(gate.shape)


silu_mul = register_op(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    reference=_silu_mul,
    fake=_silu_mul_fake,
    cuda="qcompiler.kernels.triton.activation:silu_mul",
)
gelu_mul = register_op(
    "gelu_mul(Tensor gate, Tensor up, str approximate) -> Tensor",
    reference=_gelu_mul,
    fake=_gelu_mul_fake,
    cuda="qcompiler.kernels.triton.activation:gelu_mul",
)
