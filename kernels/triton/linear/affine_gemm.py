"""Affine GEMM with the weight on the left: yᵀ [BN, BM] = W [BN, K] · xᵀ [K, BM].

A dequantized operand must be the left one for wgmma to take it from
registers. The weight enters the dot as (code − 2^(bits−1))·scale + offset,
two fmas per pair of codes in x's dtype; sums are float32.

Few tokens: each word is loaded once, each of its planes is a contiguous run
of x and one small dot. Many tokens (WIDE): the tile of x is the large
operand, so a step takes one plane of a block, and words are read again from
the cache. Words, scales and x all come through the compiler's pipeline of
asynchronous copies: 4-byte scale-and-offset pairs are wide enough for it,
16-bit scales were not, and waiting for those took half of the time.

Instructions per weight of the 4-bit loop for sm_90, counted in SASS (triton
3.6, 16 tokens): 3.7 with 64 output channels per program, 3.0 with 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.activation import activated
from qcompiler.kernels.triton.launch import let_next_start, prefetch, wait_for_earlier
from qcompiler.kernels.triton.linear.affine_codes import (
    bytes_at,
    plane_bits,
    plane_bits_at,
    quad_bytes,
    spread_high,
    weights_of_floats,
    weights_of_pairs,
)


@triton.jit
def _load_sides(sides, side_row, step, FIRST: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Scales and offsets [BN] of the plane that starts at code step·WIDTH + FIRST."""
    group = (step * WIDTH + FIRST) // GROUP if GROUP else 0
    return tl.load(sides + side_row + group)


@triton.jit
def linear_affine_gemm(
    x,
    low,
    high,
    sides,
    bias,
    out,
    M,
    N,
    K,
    side_stride,
    words,
    x_stride,
    tiles_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT); WIDTH ≥ 16.

    x [M, K] rows x_stride apart; sides [N, side_stride]; out [M, N] in x's dtype, or float32 partial sums
    [SPLIT, M, N] when SPLIT > 1. GROUP is the group size or 0; WIDTH the format's block width. WIDE: one
    plane at a time. ACTIVATION: None or that of the first half of the rows, by which the second half is
    multiplied; out is then [M, N/2], SPLIT 1 and BN at least 16. PDL: see `launch.py`; the weights fetched
    soon are those of the first two steps.
    """
    let_next_start(PDL)
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    TILE: tl.constexpr = PLANES * WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    # bf16 has no room for 8 bits in its mantissa: those codes go through float32.
    BYTES: tl.constexpr = BITS == 8 and HALF == tl.bfloat16
    MAGIC: tl.constexpr = 0x43004300 if HALF == tl.bfloat16 else 0x64006400

    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    pid_n = (pid // tiles_m).to(tl.int64)
    pid_m = (pid % tiles_m).to(tl.int64)
    number = tl.arange(0, BN)
    # Rows past the end read the last row and are not stored, so that no load of the weight needs a mask.
    if ACTIVATION is not None:
        # Eight gates and the eight rows that go with them in turn: so a thread of the dot holds both.
        channels = N // 2
        rn = (pid_n * (BN // 2) + number // 16 * 8 + number % 8).to(tl.int32)
        rn = tl.minimum(rn, channels - 1) + number // 8 % 2 * channels
    else:
        channels = N
        rn = (pid_n * BN + number).to(tl.int32)
    rm = (pid_m * BM + tl.arange(0, BM)).to(tl.int32)
    row = tl.minimum(rn, N - 1).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    x += pid_m * BM * x_stride
    x_rows = tl.arange(0, BM) * x_stride
    column = tl.arange(0, WIDTH // 2)
    word_rows = row[:, None] * words
    side_row = row * side_stride

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, TILE))
    if PDL == 2:
        sector = first * (WIDTH // 2) + tl.arange(0, WIDTH // 8) * 8
        prefetch(low + word_rows + tl.minimum(sector, words - 1)[None, :])
    wait_for_earlier(PDL)
    acc = tl.zeros((BN, BM), dtype=tl.float32)

    if WIDE:
        first *= PLANES
        last *= PLANES
        for step in range(first, last):
            side = _load_sides(sides, side_row, step, 0, WIDTH, GROUP)
            at = step // PLANES * (WIDTH // 2) + column
            word = tl.load(low + word_rows + at[None, :])
            upper = word
            if HAS_HIGH:
                upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
            k = step * WIDTH + lane
            x_mask = rm[None, :] < M
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows[None, :] + k[:, None], mask=x_mask, other=0.0)
            if not COMPILED:
                xt = xt.to(tl.float32)
            if BYTES:
                even, odd = bytes_at(word, step % PLANES)
                weight = weights_of_floats(even, odd, side[:, None], HALF, COMPILED)
            else:
                pair = plane_bits_at(word, upper, step % PLANES, BITS, MAGIC)
                weight = weights_of_pairs(pair, side[:, None], BITS, HALF, COMPILED)
            acc = tl.dot(weight, xt, acc, input_precision="ieee")
    else:
        for tile in range(first, last):
            at = tile * (WIDTH // 2) + column
            word = tl.load(low + word_rows + at[None, :])
            upper = word
            if HAS_HIGH:
                upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
            for j in tl.static_range(PLANES):
                k = tile * TILE + j * WIDTH + lane
                x_mask = rm[None, :] < M
                if not EVEN_K:
                    x_mask = x_mask & (k[:, None] < K)
                xt = tl.load(x + x_rows[None, :] + k[:, None], mask=x_mask, other=0.0)
                if not COMPILED:
                    xt = xt.to(tl.float32)
                side = _load_sides(sides, side_row, tile * PLANES, j * WIDTH, WIDTH, GROUP)
                if BYTES:
                    even, odd = quad_bytes(word, j, COMPILED)
                    weight = weights_of_floats(even, odd, side[:, None], HALF, COMPILED)
                else:
                    pair = plane_bits(word, upper, j, BITS, MAGIC, COMPILED)
                    weight = weights_of_pairs(pair, side[:, None], BITS, HALF, COMPILED)
                acc = tl.dot(weight, xt, acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        rn = (pid_n * (BN // 2) + tl.arange(0, BN // 2)).to(tl.int32)
        halves = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(halves)
        acc = tl.reshape(activated(gate, up, ACTIVATION, out.dtype.element_ty), (BN // 2, BM))
    out += split.to(tl.int64) * M * N + pid_m * BM * channels
    offsets = tl.arange(0, BM).to(tl.int64)[None, :] * channels + rn[:, None]
    mask = (rn[:, None] < channels) & (rm[None, :] < M)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)
