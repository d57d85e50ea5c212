"""Launchers of attention over a quantized KV cache: tiles and grids from shapes alone."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.kv_cache import KVFormat, kv_format
from qcompiler.kernels.ops.paged_attention_quantized import check_cache
from qcompiler.kernels.triton.attention.decode_quantized import decode_quantized_kernel
from qcompiler.kernels.triton.attention.kv_codes import scale_words
from qcompiler.kernels.triton.attention.kv_dequantize import dequantize_pages
from qcompiler.kernels.triton.attention.launch import (
    MIN_DOT,
    Tile,
    checked_pages,
    combine_splits,
    decode_splits,
    paged_attention,
)
from qcompiler.kernels.triton.attention.prefill_quantized import prefill_quantized_kernel
from qcompiler.kernels.triton.launch import early_start, next_power_of_2, on_device, sm_count

COMPILED = not isinstance(decode_quantized_kernel, InterpretedFunction)
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LONGEST_TILE = 128
# From so many queries of a sequence on, keys and values are dequantized once instead of in every tile, if
# their floats take no more than this.
DEQUANTIZE_QUERIES = 512
DEQUANTIZE_BYTES = 256 << 20


def prefill_quantized_tile(rows: int, head_dim: int, exact: bool) -> Tile:
    """Tile of the prefill kernel.

    Args:
        rows: Query rows that the longest sequence gives one key head (tokens · heads of a group).
        head_dim: Larger of the key and value head dimensions, as the planes pad them.
        exact: Products are float32.
    """
    block_m = min(max(next_power_of_2(rows), MIN_DOT), 128)
    if exact:
        return Tile(16, 16, 8, 1)
    if head_dim <= 128:
        return Tile(block_m, 64, 8 if block_m == 128 else 4, 3)
    if head_dim <= 256:
        return Tile(min(block_m, 64), 16, 8 if block_m >= 64 else 4, 3)
    return Tile(min(block_m, 32), 32, 8, 2)


def decode_quantized_tile(rows: int, head_dim: int, page_size: int, exact: bool) -> Tile:
    """Tile of the decode kernel; arguments as in `prefill_quantized_tile`, rows being the heads of a group.

    A tile within one page needs one look-up, so longer pages make longer tiles.
    """
    block_m = min(max(next_power_of_2(rows), MIN_DOT), 64)
    if exact:
        return Tile(16, 16, 4 if head_dim <= 256 else 8, 1)
    if head_dim <= 128 and block_m == MIN_DOT and page_size % _LONGEST_TILE == 0:
        return Tile(block_m, _LONGEST_TILE, 4, 3)
    if head_dim <= 256:
        # planes of 16 words are too narrow for four warps
        return Tile(block_m, 64 if head_dim <= 128 else 32, 2 if head_dim <= 64 else 4, 3)
    return Tile(min(block_m, 16), 32, 8, 2)


def paged_attention_quantized(
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
    """CUDA provider of `qcompiler::paged_attention_quantized`."""
    check_cache(q, k_pages, v_pages, k_scales, v_scales, channels, format, scale)
    out = q.new_empty(q.shape[0], q.shape[1], channels)
    if out.numel() == 0:
        return out
    launch = _decode if max_query_len == 1 else _prefill
    return launch(
        out, q if q.stride(-1) == 1 else q.contiguous(),
        checked_pages(k_pages, "k_pages"), checked_pages(v_pages, "v_pages"),
        scale_words(k_scales), scale_words(v_scales), block_table, query_start, seq_lens,
        max_query_len, kv_format(format), scale, causal, window, chunk, softcap, sinks,
    )  # fmt: skip


def _prefill(
    out: torch.Tensor,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    chosen: KVFormat,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    sequences, width = block_table.shape
    held = sequences * width * page_size * kv_heads * (head_dim + out.shape[2]) * q.element_size()
    if max_query_len >= DEQUANTIZE_QUERIES and held <= DEQUANTIZE_BYTES:
        k, v = (
            dequantize_pages(chosen, pages, scales, dim, block_table, seq_lens, q.dtype)
            for pages, scales, dim in ((k_pages, k_scales, head_dim), (v_pages, v_scales, out.shape[2]))
        )
        table = torch.arange(sequences * width, dtype=torch.int32, device=q.device).view(sequences, width)
        options = (scale, causal, window, chunk, softcap, sinks)
        return paged_attention(q, k, v, table, query_start, seq_lens, max_query_len, *options)
    shape = _widths(chosen, q, out, k_pages, v_pages)
    widest = chosen.planes * max(shape["BLOCK_WK"], shape["BLOCK_WV"])
    tile = prefill_quantized_tile(max_query_len * group, widest, q.dtype == torch.float32)
    tile_heads = min(group, tile.block_m)
    tile_tokens = tile.block_m // tile_heads
    grid = (tokens // tile_tokens + sequences + 1, kv_heads * -(-group // tile_heads))
    with on_device(q):
        prefill_quantized_kernel[grid](
            q, k_pages, v_pages, k_scales, v_scales, out, sinks, block_table, query_start, seq_lens,
            tokens, sequences, scale, softcap,
            q.stride(0), q.stride(1),
            *k_pages.stride()[:3], *v_pages.stride()[:3], *k_scales.stride()[:3], *v_scales.stride()[:3],
            block_table.stride(0), out.stride(0), out.stride(1),
            PLANES=chosen.planes, GROUP=group, TILE_HEADS=tile_heads, TILE_TOKENS=tile_tokens,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SEQUENCES_P2=next_power_of_2(sequences + 1),
            CAUSAL=causal, WINDOW=window, CHUNK=chunk, SOFTCAP=softcap > 0, SINKS=sinks is not None,
            PAGE_SIZE=k_pages.shape[1], COLUMNS=scale_columns(tile), **shape, **_dtypes(q),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _decode(
    out: torch.Tensor,
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    chosen: KVFormat,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    tokens, heads, _ = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    shape = _widths(chosen, q, out, k_pages, v_pages)
    widest = chosen.planes * max(shape["BLOCK_WK"], shape["BLOCK_WV"])
    tile = decode_quantized_tile(group, widest, page_size, q.dtype == torch.float32)
    tile_heads = min(group, tile.block_m)
    sequences = seq_lens.shape[0]
    head_programs = kv_heads * -(-group // tile_heads)
    max_keys = block_table.shape[1] * page_size
    for bound in (window, chunk):
        max_keys = min(max_keys, bound + tile.block_n) if bound > 0 else max_keys
    splits = decode_splits(sequences * head_programs, max_keys, tile.block_n, sm_count(q.device), 3)
    covered = max(sequences, tokens)  # rows of no sequence are padding, which somebody must zero
    partial = lse = out
    if splits > 1:
        partial = torch.empty(sequences, heads, splits, out.shape[2], dtype=torch.float32, device=q.device)
        lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    with on_device(q):
        decode_quantized_kernel[(splits, head_programs, sequences if splits > 1 else covered)](
            q, k_pages, v_pages, k_scales, v_scales, out, partial, lse, sinks,
            block_table, query_start, seq_lens, tokens, sequences, splits, scale, softcap,
            q.stride(0), q.stride(1),
            *k_pages.stride()[:3], *v_pages.stride()[:3], *k_scales.stride()[:3], *v_scales.stride()[:3],
            block_table.stride(0), out.stride(0), out.stride(1),
            GROUP=group, TILE_HEADS=tile_heads, KV_HEADS=kv_heads,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLIT=splits > 1,
            CAUSAL=causal, WINDOW=window, CHUNK=chunk, SOFTCAP=softcap > 0, SINKS=sinks is not None,
            PAGE_SIZE=page_size, COLUMNS=scale_columns(tile), **shape, **_dtypes(q), **early_start(q.device),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if splits > 1:
            combine_splits(partial, lse, out, query_start)
    return out


def scale_columns(tile: Tile) -> int:
    """Columns of `load_scales`: as many as give every thread an element."""
    return 4 if 32 * tile.num_warps > 2 * tile.block_n else 2


def _widths(
    chosen: KVFormat, q: torch.Tensor, out: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> dict[str, Any]:
    wk, wv = k_pages.shape[3], v_pages.shape[3]
    return {
        "FORMAT": chosen.name, "D": q.shape[2], "DV": out.shape[2], "WK": wk, "WV": wv,
        "BLOCK_WK": max(next_power_of_2(wk), MIN_DOT), "BLOCK_WV": max(next_power_of_2(wv), MIN_DOT),
    }  # fmt: skip


def _dtypes(q: torch.Tensor) -> dict[str, Any]:
    """Codes are exact in every dtype; weights times scales need the range of bfloat16, not more precision."""
    exact = q.dtype == torch.float32 or not COMPILED
    return {
        "K_DTYPE": tl.float32 if exact else _DTYPES[q.dtype],
        "V_DTYPE": tl.float32 if exact else tl.bfloat16,
        "COMPILED": COMPILED,
    }
