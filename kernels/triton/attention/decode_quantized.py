"""Decode over a quantized KV cache: as `decode.py`, with the codes turned into floats in registers.

A word holds one code of each of its planes, and plane j is the channels from
j·W on: the scores are the sum of one product per plane of queries and codes,
and every plane of the values has sums of its own, so nothing is interleaved.
A key's scale multiplies its scores; a value's scale goes into the weights:

    s_j = k_scale_j · (q·k_codes_j) + k_low_j · Σ q      (low: int4 only)
    o   = Σ_j (p_j · v_scale_j) · v_codes_j + Σ_j p_j · v_low_j
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.attention.decode import split_bounds
from qcompiler.kernels.triton.attention.kv_codes import (
    load_scales,
    load_words,
    low_of,
    plane,
    raw_offset,
    scale_of,
)
from qcompiler.kernels.triton.attention.tiles import LOG2E, softmax_step, tile_pages, tile_rows
from qcompiler.kernels.triton.launch import let_next_start, wait_for_earlier


@triton.jit
def _load_plane(q_ptr, j: tl.constexpr, e, live, W: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Channels [j·W, (j+1)·W) of the queries, DTYPE [M, BLOCK_W]; q_ptr [M] points to their first."""
    mask = live[:, None] & (e[None, :] < W) & (j * W + e[None, :] < D)
    return tl.load(q_ptr[:, None] + (j * W + e[None, :]), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store_plane(pointers, acc, low, summed, j: tl.constexpr, e, live, W: tl.constexpr, DV: tl.constexpr):
    mask = live[:, None] & (e[None, :] < W) & (j * W + e[None, :] < DV)
    mean = (acc + low[:, None]) / summed[:, None]
    tl.store(pointers[:, None] + (j * W + e[None, :]), mean.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    a0,
    a1,
    a2,
    a3,
    top,
    total,
    lows,
    q0,
    q1,
    q2,
    q3,
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
    """Fold the keys [begin, end) into sums: a0 … a3 of the planes [M, BLOCK_WV], total and lows by key."""
    PRECISION: tl.constexpr = "ieee" if K_DTYPE == tl.float32 else "tf32"
    pages = tile_pages(table, begin, end, limit, BLOCK_N, True, PAGE_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_at = k_ptr + tile_rows(pages, keys, 0, stride_k_page, stride_k_slot, True, PAGE_SIZE)
        v_at = v_ptr + tile_rows(pages, keys, 0, stride_v_page, stride_v_slot, True, PAGE_SIZE)
        ks_at = k_scales_ptr + tile_rows(pages, keys, 0, stride_ks_page, stride_ks_slot, True, PAGE_SIZE)
        vs_at = v_scales_ptr + tile_rows(pages, keys, 0, stride_vs_page, stride_vs_slot, True, PAGE_SIZE)
        pages = tile_pages(table, start + BLOCK_N, end, limit, BLOCK_N, True, PAGE_SIZE)
        # What lies past the limit is never read: its scales may be NaN, and 0 · NaN would reach the sum.
        exists = keys < limit
        k_stored, v_stored = load_scales(ks_at, vs_at, exists, COLUMNS, MASKED)
        k_words = load_words(k_at, exists, WK, BLOCK_WK, MASKED)
        v_words = load_words(v_at, exists, WV, BLOCK_WV, MASKED)

        words = tl.trans(k_words)
        k0 = plane(words, 0, FORMAT, K_DTYPE, COMPILED, True)
        k1 = plane(words, 1, FORMAT, K_DTYPE, COMPILED, True)
        scores = tl.dot(q0, k0, input_precision=PRECISION)
        scores = tl.dot(q1, k1, scores, input_precision=PRECISION)
        if FORMAT == "int4":
            k2 = plane(words, 2, FORMAT, K_DTYPE, COMPILED, True)
            k3 = plane(words, 3, FORMAT, K_DTYPE, COMPILED, True)
            scores = tl.dot(q2, k2, scores, input_precision=PRECISION)
            scores = tl.dot(q3, k3, scores, input_precision=PRECISION)
        k_scale = scale_of(k_stored, FORMAT)
        scores = scores * k_scale[None, :]
        if FORMAT == "int4":
            k_low = low_of(k_stored) - k_scale * raw_offset(FORMAT, K_DTYPE, COMPILED)
            scores += q_sum[:, None] * k_low[None, :]
        weights, top, shrink = softmax_step(
            scores, top, keys, positions, limit, scale, softcap, CAUSAL, WINDOW, CHUNK, SOFTCAP, MASKED
        )
        total = total * shrink[:, None] + weights
        if FORMAT == "int4":
            lows = lows * shrink[:, None] + weights * low_of(v_stored)[None, :]
        w = (weights * scale_of(v_stored, FORMAT)[None, :]).to(V_DTYPE)
        a0 *= shrink[:, None]
        a1 *= shrink[:, None]
        a0 = tl.dot(w, plane(v_words, 0, FORMAT, V_DTYPE, COMPILED), a0, input_precision=PRECISION)
        a1 = tl.dot(w, plane(v_words, 1, FORMAT, V_DTYPE, COMPILED), a1, input_precision=PRECISION)
        if FORMAT == "int4":
            a2 *= shrink[:, None]
            a3 *= shrink[:, None]
            a2 = tl.dot(w, plane(v_words, 2, FORMAT, V_DTYPE, COMPILED), a2, input_precision=PRECISION)
            a3 = tl.dot(w, plane(v_words, 3, FORMAT, V_DTYPE, COMPILED), a3, input_precision=PRECISION)
    return a0, a1, a2, a3, top, total, lows


@triton.jit(do_not_specialize=["tokens", "sequences", "splits"])
def decode_quantized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    sinks_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tokens,
    sequences,
    splits,
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
    D: tl.constexpr,
    DV: tl.constexpr,
    WK: tl.constexpr,
    WV: tl.constexpr,
    BLOCK_WK: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
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
    PDL: tl.constexpr,
):
    """Grid and scratch as in `decode_kernel`; W words of a head's channels, padded to BLOCK_W."""
    let_next_start(PDL)
    wait_for_earlier(PDL)
    split = tl.program_id(0)
    head_tiles: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = tl.program_id(1) // head_tiles
    sequence = tl.program_id(2).to(tl.int64)

    rows = tl.arange(0, BLOCK_M)
    member = (tl.program_id(1) % head_tiles) * TILE_HEADS + rows
    live = (rows < TILE_HEADS) & (member < GROUP)
    head = kv_head * GROUP + member
    ek = tl.arange(0, BLOCK_WK)
    ev = tl.arange(0, BLOCK_WV)
    nothing = tl.zeros([BLOCK_M], dtype=tl.float32)
    one = nothing + 1.0

    if not SPLIT:
        if (sequence >= tl.load(query_start_ptr + sequences)) & (sequence < tokens):  # a padding row
            row = out_ptr + sequence * stride_out_token + head * stride_out_head
            zero = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
            _store_plane(row, zero, nothing, one, 0, ev, live, WV, DV)
            _store_plane(row, zero, nothing, one, 1, ev, live, WV, DV)
            if FORMAT == "int4":
                _store_plane(row, zero, nothing, one, 2, ev, live, WV, DV)
                _store_plane(row, zero, nothing, one, 3, ev, live, WV, DV)
        if sequence >= sequences:
            return
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    keys_count = tl.load(seq_lens_ptr + sequence)
    if tl.load(query_start_ptr + sequence + 1) == token:
        return

    begin, end = split_bounds(keys_count, split, splits, CAUSAL, WINDOW, CHUNK, BLOCK_N)
    q_row = q_ptr + token * stride_q_token + head * stride_q_head
    q0 = _load_plane(q_row, 0, ek, live, WK, D, K_DTYPE)
    q1 = _load_plane(q_row, 1, ek, live, WK, D, K_DTYPE)
    if FORMAT == "int4":
        q2 = _load_plane(q_row, 2, ek, live, WK, D, K_DTYPE)
        q3 = _load_plane(q_row, 3, ek, live, WK, D, K_DTYPE)
        q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
        q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    else:  # not used
        q2 = q0
        q3 = q1
        q_sum = nothing
    a0 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
    a1 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
    a2 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
    a3 = tl.zeros([BLOCK_M, BLOCK_WV], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    lows = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if SINKS:  # the sink is one more score without a value; the first split counts it
        sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink * LOG2E, top)
        is_sink = (split == 0) & (tl.arange(0, BLOCK_N)[None, :] == 0)
        total = tl.where(is_sink, 1.0, total)
    positions = tl.zeros([BLOCK_M], dtype=tl.int32) + (keys_count - 1)

    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    k_scales_ptr += kv_head.to(tl.int64) * stride_ks_head
    v_scales_ptr += kv_head.to(tl.int64) * stride_vs_head
    table = table_ptr + sequence * stride_table
    # No key of the tiles before the last is hidden, unless windows or chunks hide some.
    full_end = begin if WINDOW > 0 or CHUNK > 0 else tl.maximum(end // BLOCK_N * BLOCK_N, begin)
    if not (WINDOW > 0 or CHUNK > 0):
        a0, a1, a2, a3, top, total, lows = _attend(
            a0, a1, a2, a3, top, total, lows, q0, q1, q2, q3, q_sum, positions, begin, full_end, keys_count,
            k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table,
            stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
            stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot, scale, softcap,
            FORMAT, WK, WV, BLOCK_WK, BLOCK_WV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGE_SIZE,
            K_DTYPE, V_DTYPE, COMPILED, COLUMNS, False,
        )  # fmt: skip
    a0, a1, a2, a3, top, total, lows = _attend(
        a0, a1, a2, a3, top, total, lows, q0, q1, q2, q3, q_sum, positions, full_end, end, keys_count,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot,
        stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot, scale, softcap,
        FORMAT, WK, WV, BLOCK_WK, BLOCK_WV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGE_SIZE,
        K_DTYPE, V_DTYPE, COMPILED, COLUMNS, True,
    )  # fmt: skip

    low = tl.sum(lows, 1)
    summed = tl.sum(total, 1)
    summed = tl.where(summed == 0.0, 1.0, summed)  # no key seen: sums are 0 and top −inf already
    if SPLIT:
        slot = (sequence * (KV_HEADS * GROUP) + head) * splits + split
        row = partial_ptr + slot * DV
        tl.store(lse_ptr + slot, top + tl.log2(summed), mask=live)
    else:
        row = out_ptr + token * stride_out_token + head * stride_out_head
    _store_plane(row, a0, low, summed, 0, ev, live, WV, DV)
    _store_plane(row, a1, low, summed, 1, ev, live, WV, DV)
    if FORMAT == "int4":
        _store_plane(row, a2, low, summed, 2, ev, live, WV, DV)
        _store_plane(row, a3, low, summed, 3, ev, live, WV, DV)
