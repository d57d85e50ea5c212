"""Attention inside each of several sequences laid end to end, without a cache (encoders)."""

from __future__ import annotations

from itertools import pairwise

import torch

from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.attention import attend, check_heads


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[2], k.shape[2], scale)
    starts = query_start.tolist()
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lengths = {last - first for first, last in pairwise(starts)}
    end = starts[-1]
    if len(lengths) == 1 and end > starts[0]:  # equal lengths are a plain batch
        bounds = [(starts[0], end, len(starts) - 1)]
    else:
        bounds = [(first, last, 1) for first, last in pairwise(starts) if last > first]
    for first, last, batch in bounds:
        parts = (t[first:last].unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        out[first:last] = attend(
            *parts, scale=scale, causal=causal, window=window, chunk=chunk, softcap=softcap, sinks=sinks
        ).flatten(0, 1)
    return out


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[2], k.shape[2], scale)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


ragged_attention = register_op(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor query_start, SymInt max_query_len, float scale, "
    "bool causal, int window, int chunk, float softcap, Tensor? sinks) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.launch:ragged_attention",
)
