"""Rotary position embedding (Su et al. 2021) of the first R of D channels; the rest pass through.

    y = x · cos + rotate(x) · sin
    halves:       rotate(x)[i] = −x[i + R/2], rotate(x)[i + R/2] = x[i]          (GPT-NeoX, Llama)
    interleaved:  rotate(x)[2i] = −x[2i + 1], rotate(x)[2i + 1] = x[2i]          (GPT-J, Cohere, GLM)

cos and sin have one column per channel, laid out like x (halves: the table
twice side by side; interleaved: each entry twice in a row).
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op


def broadcast_table(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A cos or sin table as it broadcasts against x [B, H, T, D]: [B, T, R] gets its head axis."""
    if table.shape[-1] % 2 or table.shape[-1] > x.shape[-1]:
        raise InvalidInputError(
            f"rotary: a table of {table.shape[-1]} columns cannot rotate {x.shape[-1]} channels",
            hint="The number of rotated channels must be even and at most the head dimension.",
        )
    return table.unsqueeze(1) if table.dim() == 3 and x.dim() == 4 else table


def _reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    cos, sin = broadcast_table(x, cos), broadcast_table(x, sin)
    rotated = cos.shape[-1]
    head = x[..., :rotated]
    if interleaved:
        swapped = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
    else:
        half = rotated // 2
        swapped = torch.cat((-head[..., half:], head[..., :half]), dim=-1)
    out = torch.empty_like(x)  # keeps the order of the strides: a transposed view stays one
    out[..., :rotated] = head * cos + swapped * sin
    if rotated < x.shape[-1]:
        out[..., rotated:] = x[..., rotated:]
    return out


def _fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    broadcast_table(x, cos)
    return torch.empty_like(x)


rotary = register_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.rotary:rotary",
)
