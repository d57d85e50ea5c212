"""Attention of ragged queries over a paged KV cache that is quantized; otherwise as `paged_attention`.

Formats are those of `kernels/formats/kv_cache.py`. The reference dequantizes the
pages that are in use and attends over them.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.formats.kv_cache import check_pages, kv_format
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.attention import check_heads
from qcompiler.kernels.ops.paged_attention import paged_attention


def check_cache(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    channels: int,
    format_name: str,
    scale: float,
) -> None:
    """Raise `InvalidInputError` unless pages and scales are of the format and fit the queries."""
    chosen = kv_format(format_name)
    heads, dim = k_pages.shape[2], q.shape[2]
    check_pages(chosen, k_pages, k_scales, heads, dim, "k")
    check_pages(chosen, v_pages, v_scales, heads, channels, "v")
    check_heads(q.shape[1], heads, v_pages.shape[2], dim, dim, scale)


def _reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    channels: int,
    format: str,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    check_cache(q, k_pages, v_pages, k_scales, v_scales, channels, format, scale)
    chosen, page_size = kv_format(format), k_pages.shape[1]
    # Only pages that hold keys are read; they are numbered anew in the order in which they are met.
    width = block_table.shape[1]
    used = torch.arange(width, device=q.device) * page_size < seq_lens.unsqueeze(1)
    pages = block_table[used].long()
    table = torch.zeros_like(block_table)
    table[used] = torch.arange(pages.numel(), dtype=table.dtype, device=q.device)
    k = chosen.dequantize(k_pages[pages], k_scales[pages], q.shape[2]).to(q.dtype)
    v = chosen.dequantize(v_pages[pages], v_scales[pages], channels).to(q.dtype)
    return paged_attention.reference(
        q, k, v, table, query_start, seq_lens, max_query_len, scale, causal, window, chunk, softcap, sinks
    )


def _fake(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    channels: int,
    format: str,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    check_cache(q, k_pages, v_pages, k_scales, v_scales, channels, format, scale)
    return q.new_empty((q.shape[0], q.shape[1], channels))


paged_attention_quantized = register_op(
    "paged_attention_quantized(Tensor q, Tensor k_pages, Tensor v_pages, Tensor k_scales, Tensor v_scales, "
    "Tensor block_table, Tensor query_start, Tensor seq_lens, SymInt max_query_len, int channels, "
    "str format, float scale, bool causal, int window, int chunk, float softcap, Tensor? sinks) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.launch_quantized:paged_attention_quantized",
)
