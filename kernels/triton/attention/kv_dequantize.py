"""Pages of a quantized cache → pages of floats, for those pages alone that a step's sequences use.

A long prefill reads every key once per tile of queries, hundreds of times: the
codes are then better turned into floats once, before, than in every tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.formats.kv_cache import KVFormat
from qcompiler.kernels.triton.attention.kv_codes import low_of, plane, scale_of
from qcompiler.kernels.triton.launch import next_power_of_2, on_device

_ROWS = 32  # tokens of a page that a program takes


@triton.jit
def _store_plane(
    words,
    scale,
    low,
    at,
    live,
    j: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    e = tl.arange(0, BLOCK_W)[None, :]
    x = plane(words, j, FORMAT, tl.float32, False) * scale[:, None]
    if FORMAT == "int4":
        x += low[:, None]
    mask = live[:, None] & (e < W) & (j * W + e < D)
    tl.store(at[:, None] + (j * W + e), x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_pages_kernel(
    words_ptr,
    scales_ptr,
    out_ptr,
    table_ptr,
    seq_lens_ptr,
    stride_page,
    stride_slot,
    stride_head,
    stride_s_page,
    stride_s_slot,
    stride_s_head,
    stride_table,
    stride_out_page,
    stride_out_slot,
    stride_out_head,
    FORMAT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Grid: (page_size / BLOCK_P, pages per sequence, sequences · heads)."""
    column = tl.program_id(1)
    sequence = tl.program_id(2) // HEADS
    head = tl.program_id(2) % HEADS
    slot = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    length = tl.load(seq_lens_ptr + sequence)
    if column * PAGE_SIZE + tl.program_id(0) * BLOCK_P >= length:
        return
    live = (slot < PAGE_SIZE) & (column * PAGE_SIZE + slot < length)
    page = tl.load(table_ptr + sequence * stride_table + column).to(tl.int64)
    row = words_ptr + page * stride_page + head * stride_head + slot * stride_slot
    e = tl.arange(0, BLOCK_W)
    words = tl.load(row[:, None] + e[None, :], mask=live[:, None] & (e[None, :] < W), other=0)
    at = scales_ptr + page * stride_s_page + head * stride_s_head + slot * stride_s_slot
    stored = tl.load(at, mask=live, other=0)
    scale = scale_of(stored, FORMAT)
    low = scale
    if FORMAT == "int4":
        low = low_of(stored)
    made = (sequence * tl.num_programs(1) + column).to(tl.int64)
    out = out_ptr + made * stride_out_page + head * stride_out_head + slot * stride_out_slot
    _store_plane(words, scale, low, out, live, 0, FORMAT, D, W, BLOCK_W)
    _store_plane(words, scale, low, out, live, 1, FORMAT, D, W, BLOCK_W)
    if FORMAT == "int4":
        _store_plane(words, scale, low, out, live, 2, FORMAT, D, W, BLOCK_W)
        _store_plane(words, scale, low, out, live, 3, FORMAT, D, W, BLOCK_W)


def dequantize_pages(
    chosen: KVFormat,
    pages: torch.Tensor,
    scales: torch.Tensor,
    dim: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The pages that sequences use, in the order of their tables.

    Args:
        chosen: Format of the cache.
        pages: Words [pages, page_size, heads, W].
        scales: One 4-byte element per token and head [pages, page_size, heads].
        dim: Channels of a head.
        block_table: int32 [S, P].
        seq_lens: int32 [S].
        dtype: Of the result.

    Returns:
        [S · P, page_size, heads, dim], one head after the other in memory; page p of sequence s is s · P + p.
        Rows of tokens that do not exist hold anything.
    """
    sequences, width = block_table.shape
    page_size, heads, words = pages.shape[1:]
    out = torch.empty(sequences * width, heads, page_size, dim, dtype=dtype, device=pages.device)
    out = out.transpose(1, 2)
    block = min(next_power_of_2(page_size), _ROWS)
    with on_device(pages):
        dequantize_pages_kernel[(-(-page_size // block), width, sequences * heads)](
            pages, scales, out, block_table, seq_lens,
            *pages.stride()[:3], *scales.stride()[:3], block_table.stride(0), *out.stride()[:3],
            FORMAT=chosen.name, HEADS=heads, D=dim, W=words, BLOCK_W=next_power_of_2(words),
            BLOCK_P=block, PAGE_SIZE=page_size, num_warps=4,
        )  # fmt: skip
    return out
