"""The loop that the attention kernels share: online softmax over tiles of keys (Dao 2023, FlashAttention-2).

Scores are kept in units of log2 so that the exponential is one `exp2`. Masked
tiles hide keys by position; full tiles, the bulk of a long prefill, skip that.
The pages of a tile are looked up one tile ahead: a look-up inside the tile is
one more link of the chain that Triton pipelines, which then holds one buffer
less of keys and values and overlaps nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_pages(table, start, end, limit, BLOCK_N: tl.constexpr, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pages of the tile of keys at `start`, a multiple of BLOCK_N: one if it lies in one, else [BLOCK_N].

    Nothing is read for tiles from `end` on or for keys from `limit` on.
    """
    if PAGED:
        if PAGE_SIZE % BLOCK_N == 0:
            return tl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
        else:
            keys = start + tl.arange(0, BLOCK_N)
            return tl.load(table + keys // PAGE_SIZE, mask=(keys < limit) & (start < end), other=0)
    else:
        return start


@triton.jit
def tile_rows(
    pages,
    keys,
    key_base,
    stride_page,
    stride_slot,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Element offsets int64 [BLOCK_N] of the cache rows of `keys` in their pages."""
    if PAGED:
        return pages.to(tl.int64) * stride_page + (keys % PAGE_SIZE).to(tl.int64) * stride_slot
    else:
        return (key_base + keys).to(tl.int64) * stride_slot


@triton.jit
def softmax_step(
    scores,
    top,
    keys,
    positions,
    limit,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Weights of a tile: exp2(score − largest so far).

    Args:
        scores: q·k [M, N].
        top: Largest score before this tile [M], in log2 units.

    Returns:
        weights [M, N], the new top, and the factor [M] by which older sums shrink.
    """
    if SOFTCAP:
        # tanh(x) = 1 − 2 / (1 + exp(2x)), exact at both ends when exp overflows or vanishes
        grown = tl.exp2(scores * (2.0 * LOG2E * scale / softcap))
        scores = 1.0 - 2.0 / (1.0 + grown)
        unit = softcap * LOG2E
    else:
        unit = scale * LOG2E

    if MASKED:
        seen = keys[None, :] < limit
        if CAUSAL:
            seen = seen & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            if CAUSAL:
                seen = seen & (positions[:, None] - keys[None, :] < WINDOW)
            else:
                seen = seen & (tl.abs(positions[:, None] - keys[None, :]) <= WINDOW)
        if CHUNK > 0:
            seen = seen & (positions[:, None] // CHUNK == keys[None, :] // CHUNK)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen no key yet
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * unit)
        base = new_top
    # unit > 0 lets the maximum be taken before scaling: one fused multiply-add and one exp2 per score
    return tl.exp2(scores * unit - base[:, None]), new_top, tl.exp2(top - base)


@triton.jit
def attend_tiles(
    acc,
    top,
    total,
    q,
    positions,
    begin,
    end,
    limit,
    k_ptr,
    v_ptr,
    table,
    key_base,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    DEFERRED: tl.constexpr,
):
    """Fold the keys [begin, end) into (acc, top, total); `begin` is a multiple of BLOCK_N.

    acc [M, BLOCK_DV] sums of values, top [M] largest score so far in log2
    units, total [M] sum of exp2(score − top), or [M, BLOCK_N] with the sum
    over keys DEFERRED; positions [M] of the query rows; keys from `limit` on
    do not exist.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    pages = tile_pages(table, begin, end, limit, BLOCK_N, PAGED, PAGE_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_rows = tile_rows(pages, keys, key_base, stride_k_page, stride_k_slot, PAGED, PAGE_SIZE)
        v_rows = tile_rows(pages, keys, key_base, stride_v_page, stride_v_slot, PAGED, PAGE_SIZE)
        pages = tile_pages(table, start + BLOCK_N, end, limit, BLOCK_N, PAGED, PAGE_SIZE)
        k_at = k_ptr + k_rows[:, None] + d[None, :]
        v_at = v_ptr + v_rows[:, None] + dv[None, :]
        # Rows past the limit are never read: they may hold NaN, and 0 · NaN would reach the sum.
        if MASKED:
            k = tl.load(k_at, mask=(keys[:, None] < limit) & (d[None, :] < D), other=0.0)
        elif BLOCK_D == D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=d[None, :] < D, other=0.0)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights, top, shrink = softmax_step(
            scores, top, keys, positions, limit, scale, softcap, CAUSAL, WINDOW, CHUNK, SOFTCAP, MASKED
        )
        if DEFERRED:
            total = total * shrink[:, None] + weights
        else:
            total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            v = tl.load(v_at, mask=(keys[:, None] < limit) & (dv[None, :] < DV), other=0.0)
        elif BLOCK_DV == DV:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=dv[None, :] < DV, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total
