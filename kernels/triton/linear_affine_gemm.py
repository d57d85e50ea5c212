"""Affine GEMM with the weight on the left: yᵀ [BN, BM] = W [BN, K] · xᵀ [K, BM].

A dequantized operand must be the left one for wgmma to take it from
registers. Each word is loaded once; each of its planes is a contiguous run of
x and one small dot into one accumulator. The weight enters the dot as
(code − 2^(bits−1))·scale + (2^(bits−1) − zero)·scale, one fma in x's dtype;
sums are float32.

Instructions per weight of the 4-bit loop for sm_90, counted in SASS (triton
3.6, 16 tokens): 4.0 with 64 output channels per program, 3.2 with 128; no
spills. Of the former 1.0 is the two fmas of a pair, 0.5 masks, 0.4 shifts;
most of the rest loads and converts scales and zeros. Weights are read 16
bytes at a time into shared memory and reach wgmma through registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear_affine_codes import dequantize_plane, spread_high


@triton.jit
def _scale_and_offset(scales, zeros, at, CENTRE: tl.constexpr):
    """Scale and (centre − zero)·scale, float32."""
    scale = tl.load(scales + at).to(tl.float32)
    return scale, (CENTRE - tl.load(zeros + at).to(tl.float32)) * scale


@triton.jit
def linear_affine_gemm(
    x,
    low,
    high,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    GROUPS,
    words,
    x_stride,
    tiles_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT).

    x [M, K] rows x_stride apart; out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N] when
    SPLIT > 1. GROUP is the group size or 0; WIDTH the format's block width.
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16  # a dot needs 16 columns of K
    BLOCK: tl.constexpr = PLANES * WIDTH
    TILE: tl.constexpr = PLANES * LANES
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    ONE_BLOCK: tl.constexpr = WIDTH == LANES

    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    pid_n = (pid // tiles_m).to(tl.int64)
    pid_m = (pid % tiles_m).to(tl.int64)
    rn = (pid_n * BN + tl.arange(0, BN)).to(tl.int32)
    rm = (pid_m * BM + tl.arange(0, BM)).to(tl.int32)
    # Rows past the end read the last row and are not stored, so that no load of the weight needs a mask.
    row = tl.minimum(rn, N - 1)
    lane = tl.arange(0, LANES)
    if ONE_BLOCK:
        position = lane
    else:
        position = (lane // WIDTH) * BLOCK + lane % WIDTH
    x += pid_m * BM * x_stride
    x_rows = tl.arange(0, BM) * x_stride
    column = tl.arange(0, LANES // 2)
    # Where the two codes of a word begin, as `position` of the even one.
    pair_position = (2 * column // WIDTH) * BLOCK + 2 * column % WIDTH
    word_rows = row.to(tl.int64)[:, None] * words

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, TILE))
    acc = tl.zeros((BN, BM), dtype=tl.float32)

    for tile in range(first, last):
        at = tile * (LANES // 2) + column
        if not ONE_BLOCK:
            at = tl.minimum(at, words - 1)
        word = tl.load(low + word_rows + at[None, :])
        upper = word
        if HAS_HIGH:
            upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
        for j in tl.static_range(PLANES):
            k = tile * TILE + j * WIDTH + position
            x_mask = rm[None, :] < M
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows[None, :] + k[:, None], mask=x_mask, other=0.0)
            if not COMPILED:
                xt = xt.to(tl.float32)
            if ONE_BLOCK:
                group = tl.minimum((tile * TILE + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
                scale, offset = _scale_and_offset(scales, zeros, group * N + row, CENTRE)
                scale = scale[:, None]
                offset = offset[:, None]
            else:
                first_k = tile * TILE + j * WIDTH + pair_position
                groups = tl.minimum(first_k // GROUP, GROUPS - 1) if GROUP else first_k * 0
                scale, offset = _scale_and_offset(scales, zeros, groups[None, :] * N + row[:, None], CENTRE)
            weight = dequantize_plane(word, upper, scale, offset, j, BITS, HALF, COMPILED)
            acc = tl.dot(weight, xt, acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    out += split.to(tl.int64) * M * N + pid_m * BM * N
    offsets = tl.arange(0, BM).to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))
