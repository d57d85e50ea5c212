"""Flash attention of ragged query blocks over a quantized paged cache; tiles and grid as in `prefill.py`.

A tile of codes becomes a tile of floats on its way to the matrix unit, once
for all query rows of the program; scales are folded as in
`decode_quantized.py`. The channels of queries and results stand in the
order of the planes, which is their own unless the words are padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.attention.kv_codes import (
    all_planes,
    load_scales,
    load_words,
    low_of,
    raw_offset,
    scale_of,
)
from qcompiler.kernels.triton.attention.prefill import find_tile, key_bounds
from qcompiler.kernels.triton.attention.tiles import LOG2E, softmax_step, tile_pages, tile_rows


@triton.jit
def _channels(W: tl.constexpr, BLOCK_W: tl.constexpr, PLANES: tl.constexpr):
    """Channel of each column [PLANES · BLOCK_W]; a large number for the padding of a plane."""
    column = tl.arange(0, PLANES * BLOCK_W)
    if W == BLOCK_W:
        return column
    else:
        e = column % BLOCK_W
        return tl.where(e < W, column // BLOCK_W * W + e, 1 << 20)


@triton.jit
def _attend(
    acc,
    top,
    total,
    low,
    q,
    q_sum,
    positions,
    begin,
    end,
    limit,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    table,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    stride_ks_page,
    stride_ks_slot,
    stride_vs_page,
    stride_vs_slot,
    scale,
    softcap,
    FORMAT: tl.constexpr,
    WK: tl.constexpr,
    WV: tl.constexpr,
    BLOCK_WK: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys [begin, end) into (acc, top, total, low): `attend_tiles`, low [M] being Σ p · v_low."""
    PRECISION: tl.constexpr = "ieee" if K_DTYPE == tl.float32 else "tf32"
    pages = tile_pages(table, begin, end, limit, BLOCK_N, True, PAGE_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_at = k_ptr + tile_rows(pages, keys, 0, stride_k_page, stride_k_slot, True, PAGE_SIZE)
        v_at = v_ptr + tile_rows(pages, keys, 0, stride_v_page, stride_v_slot, True, PAGE_SIZE)
        ks_at = k_scales_ptr + tile_rows(pages, keys, 0, stride_ks_page, stride_ks_slot, True, PAGE_SIZE)
        vs_at = v_scales_ptr + tile_rows(pages, keys, 0, stride_vs_page, stride_vs_slot, True, PAGE_SIZE)
        pages = tile_pages(table, start + BLOCK_N, end, limit, BLOCK_N, True, PAGE_SIZE)
        exists = keys < limit
        k_stored, v_stored = load_scales(ks_at, vs_at, exists, COLUMNS, MASKED)
        k_words = load_words(k_at, exists, WK, BLOCK_WK, MASKED)
        v_words = load_words(v_at, exists, WV, BLOCK_WV, MASKED)
        k = all_planes(k_words, FORMAT, K_DTYPE, COMPILED, True)
        k_scale = scale_of(k_stored, FORMAT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * k_scale[None, :]
        if FORMAT == "int4":
            k_low = low_of(k_stored) - k_scale * raw_offset(FORMAT, K_DTYPE, COMPILED)
            scores += q_sum[:, None] * k_low[None, :]
        weights, top, shrink = softmax_step(
            scores, top, keys, positions, limit, scale, softcap, CAUSAL, WINDOW, CHUNK, SOFTCAP, MASKED
        )
        total = total * shrink + tl.sum(weights, 1)
        if FORMAT == "int4":
            low = low * shrink + tl.sum(weights * low_of(v_stored)[None, :], 1)
        w = (weights * scale_of(v_stored, FORMAT)[None, :]).to(V_DTYPE)
        v = all_planes(v_words, FORMAT, V_DTYPE, COMPILED)
        acc = tl.dot(w, v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total, low


@triton.jit(do_not_specialize=["tokens", "sequences"])
def prefill_quantized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    sinks_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tokens,
    sequences,
    scale,
    softcap,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_ks_page,
    stride_ks_slot,
    stride_ks_head,
    stride_vs_page,
    stride_vs_slot,
    stride_vs_head,
    stride_table,
    stride_out_token,
    stride_out_head,
    FORMAT: tl.constexpr,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WK: tl.constexpr,
    WV: tl.constexpr,
    BLOCK_WK: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEQUENCES_P2: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_DTYPE: tl.constexpr,
    V_DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (tokens // TILE_TOKENS + sequences + 1, key heads · head tiles)."""
    # Late tiles see the most keys when causal: start them first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head_tiles: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = tl.program_id(1) // head_tiles
    head_tile = tl.program_id(1) % head_tiles
    sequence, is_sequence, first, length, first_token = find_tile(
        query_start_ptr, block, tokens, sequences, TILE_TOKENS, SEQUENCES_P2
    )
    if first_token >= length:
        return
    keys = tl.load(seq_lens_ptr + sequence, mask=is_sequence, other=0)

    rows = tl.arange(0, BLOCK_M)
    token = first_token + rows // TILE_HEADS
    member = head_tile * TILE_HEADS + rows % TILE_HEADS
    live = (rows < TILE_HEADS * TILE_TOKENS) & (token < length) & (member < GROUP)
    head = kv_head * GROUP + member
    positions = keys - length + token
    d = _channels(WK, BLOCK_WK, PLANES)
    q_at = (first + token).to(tl.int64)[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d[None, :] < D), other=0.0).to(K_DTYPE)
    q_sum = tl.sum(q.to(tl.float32), 1)

    position_low = keys - length + first_token
    low, full_low, full_high, high = key_bounds(
        position_low, tl.minimum(position_low + TILE_TOKENS, keys) - 1, keys, CAUSAL, WINDOW, CHUNK, BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, PLANES * BLOCK_WV], dtype=tl.float32)
    v_low = tl.zeros([BLOCK_M], dtype=tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)

    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    k_scales_ptr += kv_head.to(tl.int64) * stride_ks_head
    v_scales_ptr += kv_head.to(tl.int64) * stride_vs_head
    table = table_ptr + sequence.to(tl.int64) * stride_table
    if WINDOW > 0 or CHUNK > 0:
        acc, top, total, v_low = _attend(
            acc, top, total, v_low, q, q_sum, positions, low, full_low, keys,
            k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table,
            stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
            stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot, scale, softcap,
            FORMAT, WK, WV, BLOCK_WK, BLOCK_WV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGE_SIZE,
            K_DTYPE, V_DTYPE, COMPILED, COLUMNS, True,
        )  # fmt: skip
    acc, top, total, v_low = _attend(
        acc, top, total, v_low, q, q_sum, positions, full_low, full_high, keys,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
        stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot, scale, softcap,
        FORMAT, WK, WV, BLOCK_WK, BLOCK_WV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGE_SIZE,
        K_DTYPE, V_DTYPE, COMPILED, COLUMNS, False,
    )  # fmt: skip
    acc, top, total, v_low = _attend(
        acc, top, total, v_low, q, q_sum, positions, full_high, high, keys,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
        stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot, scale, softcap,
        FORMAT, WK, WV, BLOCK_WK, BLOCK_WV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGE_SIZE,
        K_DTYPE, V_DTYPE, COMPILED, COLUMNS, True,
    )  # fmt: skip

    acc = (acc + v_low[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
    dv = _channels(WV, BLOCK_WV, PLANES)
    at = (
        (first + token).to(tl.int64)[:, None] * stride_out_token
        + head[:, None] * stride_out_head
        + dv[None, :]
    )
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv[None, :] < DV))
