"""Decode: one query per sequence over a paged cache, the keys split over programs (flash-decoding).

The query heads that share a key head form the rows of one tile. Each split
writes its softmax-weighted mean and log-sum-exp; a second kernel combines
them. The number of splits comes from shapes alone, the split bounds from the
sequence length on the device, so a CUDA graph replays for any lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.attention.tiles import LOG2E, attend_tiles
from qcompiler.kernels.triton.launch import let_next_start, wait_for_earlier


@triton.jit
def split_bounds(
    keys,
    split,
    splits,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys [begin, end) of one of the splits of what the last of `keys` positions may see: whole tiles."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(keys - WINDOW if CAUSAL else keys - 1 - WINDOW, 0)
    if CHUNK > 0:
        low = tl.maximum(low, tl.maximum(keys - 1, 0) // CHUNK * CHUNK)
    low = low // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(keys - low, BLOCK_N)
    begin = low + split * tiles // splits * BLOCK_N
    end = low + (split + 1) * tiles // splits * BLOCK_N
    return begin, tl.minimum(end, keys)


@triton.jit(do_not_specialize=["tokens", "sequences", "splits"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    stride_table,
    stride_out_token,
    stride_out_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (splits, key heads · head tiles, sequences, or max(sequences, tokens) where nothing is SPLIT).

    partial fp32 [sequences, heads, splits, DV], lse fp32 [sequences, heads, splits] in log2 units.
    """
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
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    if not SPLIT:
        if (sequence >= tl.load(query_start_ptr + sequences)) & (sequence < tokens):  # a padding row
            at = sequence * stride_out_token + head[:, None] * stride_out_head + dv[None, :]
            zero = tl.zeros([BLOCK_M, BLOCK_DV], dtype=out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, zero, mask=live[:, None] & (dv[None, :] < DV))
        if sequence >= sequences:
            return
    token = tl.load(query_start_ptr + sequence).to(tl.int64)
    keys = tl.load(seq_lens_ptr + sequence)  # before it is known whether they are needed: one wait, not two
    if tl.load(query_start_ptr + sequence + 1) == token:
        return

    begin, end = split_bounds(keys, split, splits, CAUSAL, WINDOW, CHUNK, BLOCK_N)
    q_at = token * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d[None, :] < D), other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    # Kept per key of the tile and added up at the end: a sum over all warps for each tile costs a barrier.
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if SINKS:  # the sink is one more score without a value; the first split counts it
        sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink * LOG2E, top)
        is_sink = (split == 0) & (tl.arange(0, BLOCK_N)[None, :] == 0)
        total = tl.where(is_sink, 1.0, total)
    positions = tl.zeros([BLOCK_M], dtype=tl.int32) + (keys - 1)
    acc, top, total = attend_tiles(
        acc, top, total, q, positions, begin, end, keys,
        k_ptr + kv_head.to(tl.int64) * stride_k_head, v_ptr + kv_head.to(tl.int64) * stride_v_head,
        table_ptr + sequence * stride_table, 0,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, scale, softcap,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, True, PAGE_SIZE, PRECISION, True,
        True,
    )  # fmt: skip

    summed = tl.sum(total, 1)
    summed = tl.where(summed == 0.0, 1.0, summed)  # no key seen: acc is 0 and top −inf already
    acc = acc / summed[:, None]
    if SPLIT:
        slot = (sequence * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(partial_ptr + slot[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv[None, :] < DV))
        tl.store(lse_ptr + slot, top + tl.log2(summed), mask=live)
    else:
        at = token * stride_out_token + head[:, None] * stride_out_head + dv[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv[None, :] < DV))


@triton.jit(do_not_specialize=["tokens", "sequences", "splits"])
def combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    query_start_ptr,
    tokens,
    sequences,
    splits,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weighted mean of the splits. Grid: (max(sequences, tokens), heads)."""
    let_next_start(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dv = tl.arange(0, BLOCK_DV)
    out = out_ptr + head * stride_out_head + dv
    wait_for_earlier(PDL)
    padding = (sequence >= tl.load(query_start_ptr + sequences)) & (sequence < tokens)
    is_sequence = sequence < sequences
    token = tl.load(query_start_ptr + sequence, mask=is_sequence, other=0).to(tl.int64)
    after = tl.load(query_start_ptr + sequence + 1, mask=is_sequence, other=0)
    if padding:
        zero = tl.zeros([BLOCK_DV], dtype=out_ptr.dtype.element_ty)
        tl.store(out + sequence * stride_out_token, zero, mask=dv < DV)
    if after == token:  # nothing to do, or no sequence at all
        return
    split = tl.arange(0, SPLITS_P2)
    slots = (sequence * HEADS + head) * splits + split
    lse = tl.load(lse_ptr + slots, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    mask = (split[:, None] < splits) & (dv[None, :] < DV)
    parts = tl.load(partial_ptr + slots[:, None] * DV + dv[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    mean = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + token * stride_out_token, mean.to(out_ptr.dtype.element_ty), mask=dv < DV)
