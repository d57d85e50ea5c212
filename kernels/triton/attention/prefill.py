"""Flash attention over ragged query blocks, keys paged or laid end to end.

A program owns a tile of query rows: a run of tokens of one sequence times the
query heads that share one key head, so grouped heads read each key once. The
tile finds its sequence on the device, from `query_start` alone, so the grid
depends on shapes only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.attention.tiles import LOG2E, attend_tiles


@triton.jit
def find_tile(
    query_start_ptr, block, tokens, sequences, TILE_TOKENS: tl.constexpr, SEQUENCES_P2: tl.constexpr
):
    """Whose rows a block of TILE_TOKENS tokens holds.

    Returns:
        The sequence, whether it is one (or the padding behind the last), its first token of the step, how
        many tokens it has, and which of them the block begins with; none if that is not below their number.
    """
    # Sequence s owns the blocks from query_start[s] // TILE_TOKENS + s on, always enough of them. The rows
    # after the last sequence are one more sequence without keys: its tiles write the zeros.
    index = tl.arange(0, SEQUENCES_P2)
    starts = tl.load(query_start_ptr + index, mask=index <= sequences, other=0)
    owned = (index <= sequences) & (starts // TILE_TOKENS + index <= block)
    sequence = tl.sum(owned.to(tl.int32), 0) - 1
    first = tl.load(query_start_ptr + sequence)
    is_sequence = sequence < sequences
    last = tl.load(query_start_ptr + sequence + 1, mask=is_sequence, other=0)
    last = tl.where(is_sequence, last, tokens)
    first_token = (block - first // TILE_TOKENS - sequence) * TILE_TOKENS
    return sequence, is_sequence, first, last - first, first_token


@triton.jit
def key_bounds(
    position_low,
    position_high,
    keys,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bounds of the loops over tiles of keys for the query positions [position_low, position_high].

    Returns:
        low, full_low, full_high, high: rows may see keys of [low, high), and all of [full_low, full_high).
        All but `high` are multiples of BLOCK_N.
    """
    low = 0
    high = keys
    full_low = 0
    full_high = keys
    if CAUSAL:
        high = tl.minimum(high, position_high + 1)
        full_high = tl.minimum(full_high, position_low + 1)
    if WINDOW > 0:
        reach: tl.constexpr = WINDOW - 1 if CAUSAL else WINDOW
        low = tl.maximum(low, position_low - reach)
        full_low = tl.maximum(full_low, position_high - reach)
        if not CAUSAL:
            high = tl.minimum(high, position_high + WINDOW + 1)
            full_high = tl.minimum(full_high, position_low + WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, tl.maximum(position_low, 0) // CHUNK * CHUNK)
        full_low = tl.maximum(full_low, tl.maximum(position_high, 0) // CHUNK * CHUNK)
        high = tl.minimum(high, (tl.maximum(position_high, 0) // CHUNK + 1) * CHUNK)
        full_high = tl.minimum(full_high, (tl.maximum(position_low, 0) // CHUNK + 1) * CHUNK)
    low = low // BLOCK_N * BLOCK_N
    full_low = (full_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    # Where no tile is full the first masked loop takes them all: low ≤ full_low ≤ full_high.
    full_low = tl.maximum(tl.minimum(full_low, tl.cdiv(tl.maximum(high, 0), BLOCK_N) * BLOCK_N), low)
    full_high = tl.maximum(tl.maximum(full_high, 0) // BLOCK_N * BLOCK_N, full_low)
    return low, full_low, full_high, high


@triton.jit(do_not_specialize=["tokens", "sequences"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sinks_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    key_start_ptr,
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
    stride_table,
    stride_out_token,
    stride_out_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
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
    PAGED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
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
    if PAGED:
        keys = tl.load(seq_lens_ptr + sequence, mask=is_sequence, other=0)
        key_base = 0
    else:
        key_base = tl.load(key_start_ptr + sequence, mask=is_sequence, other=0)
        keys = tl.load(key_start_ptr + sequence + 1, mask=is_sequence, other=0) - key_base

    rows = tl.arange(0, BLOCK_M)
    token = first_token + rows // TILE_HEADS
    member = head_tile * TILE_HEADS + rows % TILE_HEADS
    live = (rows < TILE_HEADS * TILE_TOKENS) & (token < length) & (member < GROUP)
    head = kv_head * GROUP + member
    positions = keys - length + token
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_at = (first + token).to(tl.int64)[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d[None, :] < D), other=0.0)

    position_low = keys - length + first_token
    low, full_low, full_high, high = key_bounds(
        position_low, tl.minimum(position_low + TILE_TOKENS, keys) - 1, keys, CAUSAL, WINDOW, CHUNK, BLOCK_N
    )

    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32)
        top = sink * LOG2E
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)

    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    table = table_ptr
    if PAGED:
        table += sequence.to(tl.int64) * stride_table
    if WINDOW > 0 or CHUNK > 0:
        acc, top, total = attend_tiles(
            acc, top, total, q, positions, low, full_low, keys, k_ptr, v_ptr, table, key_base,
            stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, scale, softcap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGED, PAGE_SIZE, PRECISION,
            True, False,
        )  # fmt: skip
    acc, top, total = attend_tiles(
        acc, top, total, q, positions, full_low, full_high, keys, k_ptr, v_ptr, table, key_base,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, scale, softcap,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGED, PAGE_SIZE, PRECISION, False,
        False,
    )  # fmt: skip
    acc, top, total = attend_tiles(
        acc, top, total, q, positions, full_high, high, keys, k_ptr, v_ptr, table, key_base,
        stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, scale, softcap,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOW, CHUNK, SOFTCAP, PAGED, PAGE_SIZE, PRECISION, True,
        False,
    )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = (
        (first + token).to(tl.int64)[:, None] * stride_out_token
        + head[:, None] * stride_out_head
        + dv[None, :]
    )
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv[None, :] < DV))
