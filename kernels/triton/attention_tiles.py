"""The loop that the attention kernels share: online softmax over tiles of keys (Dao 2023, FlashAttention-2).

Scores are kept in units of log2 so that the exponential is one `exp2`. Masked
tiles hide keys by position; full tiles, the bulk of a long prefill, skip that.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_offsets(
    keys,
    start,
    limit,
    table,
    key_base,
    stride_page,
    stride_slot,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Element offsets int64 [BLOCK_N] of the cache rows of `keys`; `start`, the first, divides by BLOCK_N."""
    if PAGED:
        if PAGE_SIZE % BLOCK_N == 0:  # the whole tile lies in one page
            page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(table + keys // PAGE_SIZE, mask=keys < limit, other=0).to(tl.int64)
        return page * stride_page + (keys % PAGE_SIZE).to(tl.int64) * stride_slot
    else:
        return (key_base + keys).to(tl.int64) * stride_slot


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
):
    """Fold the keys [begin, end) into (acc, top, total); `begin` is a multiple of BLOCK_N.

    acc [M, BLOCK_DV] sums of values, top [M] largest score so far in log2
    units, total [M] sum of exp2(score − top); positions [M] of the query rows;
    keys from `limit` on do not exist.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_rows = tile_offsets(
            keys, start, limit, table, key_base, stride_k_page, stride_k_slot, BLOCK_N, PAGED, PAGE_SIZE
        )
        v_rows = tile_offsets(
            keys, start, limit, table, key_base, stride_v_page, stride_v_slot, BLOCK_N, PAGED, PAGE_SIZE
        )
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
        weights = tl.exp2(scores * unit - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            v = tl.load(v_at, mask=(keys[:, None] < limit) & (dv[None, :] < DV), other=0.0)
        elif BLOCK_DV == DV:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=dv[None, :] < DV, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total
