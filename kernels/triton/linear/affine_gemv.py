"""Affine GEMV for one to eight tokens, the dense weight for many, and the sum of split-K partial results.

The GEMV multiplies on the float32 units: per group Σ (128 + code)·x and Σ x
are formed side by side and joined as scale·(Σ (128 + code)·x − (128 + zero)·Σ x),
so codes stay exact and no weight is ever rounded to x's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.activation import activated
from qcompiler.kernels.triton.launch import let_next_start, wait_for_earlier
from qcompiler.kernels.triton.linear.affine_codes import interleave, plane_floats, spread_high
from qcompiler.kernels.triton.linear.x_pairs import pair_floats


@triton.jit
def _x_pair(x, at, present, K, PAIRS: tl.constexpr, EVEN_K: tl.constexpr, HALF: tl.constexpr):
    """x[2·at] and x[2·at + 1] as float32, 0 from K on; PAIRS: 16-bit x, both in one int32 load."""
    if PAIRS:
        mask = present if EVEN_K else present & (2 * at < K)
        pair = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
        return pair_floats(pair, HALF)
    else:
        even = tl.load(x + 2 * at, mask=present if EVEN_K else present & (2 * at < K), other=0.0)
        odd = tl.load(x + 2 * at + 1, mask=present if EVEN_K else present & (2 * at + 1 < K), other=0.0)
        return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def linear_affine_gemv(
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
    PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT); M ≤ BM.

    x [M, K] rows x_stride apart; PAIRS needs even K, even x_stride and x on a 4-byte boundary.
    out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N] when SPLIT > 1.
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16
    BLOCK: tl.constexpr = PLANES * WIDTH
    TILE: tl.constexpr = PLANES * LANES
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    CODE_BIAS: tl.constexpr = -128.0 if BITS == 8 else 128.0

    pid_n = tl.program_id(0)
    split = tl.program_id(1)
    rn = pid_n * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    column = tl.arange(0, LANES // 2)
    # Half the position in K, in plane 0 of the first tile, of the two codes in a word.
    if WIDTH == LANES:
        position = column
    else:
        position = column // (WIDTH // 2) * (BLOCK // 2) + column % (WIDTH // 2)
    word_rows = row.to(tl.int64)[:, None] * words
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, TILE))
    sums = ()
    for _ in tl.static_range(BM):
        sums = sums + (tl.zeros((BN, LANES // 2), dtype=tl.float32),)  # type: ignore[assignment]
    for tile in range(first, last):
        at = tile * (LANES // 2) + column
        if WIDTH != LANES:
            at = tl.minimum(at, words - 1)
        word = tl.load(low + word_rows + at[None, :], eviction_policy="evict_first")
        upper = word
        if HAS_HIGH:
            upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
        for j in tl.static_range(PLANES):
            pair = (tile * (TILE // 2) + j * (WIDTH // 2) + position)[None, :]
            if WIDTH == LANES:
                group = tl.minimum((tile * TILE + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
                at_scale = (group * N + row)[:, None]
            else:
                groups = tl.minimum(2 * pair // GROUP, GROUPS - 1) if GROUP else pair * 0
                at_scale = groups * N + row[:, None]
            scale = tl.load(scales + at_scale).to(tl.float32)
            zero = tl.load(zeros + at_scale).to(tl.float32) + CODE_BIAS
            even, odd = plane_floats(word, upper, j, BITS, COMPILED)
            grown = ()
            for m in tl.static_range(BM):
                even_x, odd_x = _x_pair(x + m * x_stride, pair, m < M, K, PAIRS, EVEN_K, HALF)
                product = even * even_x + odd * odd_x - zero * (even_x + odd_x)
                grown = grown + (sums[m] + scale * product,)  # type: ignore[assignment]
            sums = grown

    out += split.to(tl.int64) * M * N
    for m in tl.static_range(BM):
        y = tl.sum(sums[m], axis=1)
        if HAS_BIAS:
            y += tl.load(bias + row).to(tl.float32)
        tl.store(out + m * N + rn, y.to(out.dtype.element_ty), mask=(rn < N) & (m < M))


@triton.jit
def dequantize_affine_kernel(
    low,
    high,
    scales,
    zeros,
    out,
    N,
    K,
    GROUPS,
    words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (K tiles, cdiv(N, BN)): the dense weight [N, K] in out's dtype, rounded once from float32."""
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16
    BLOCK: tl.constexpr = PLANES * WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    CODE_BIAS: tl.constexpr = -128.0 if BITS == 8 else 128.0

    tile = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    at = tl.minimum(tile * (LANES // 2) + tl.arange(0, LANES // 2), words - 1)
    lane = tl.arange(0, LANES)
    position = (lane // WIDTH) * BLOCK + lane % WIDTH
    words_at = row.to(tl.int64)[:, None] * words + at[None, :]
    word = tl.load(low + words_at)
    upper = word
    if HAS_HIGH:
        upper = spread_high(tl.load(high + words_at), BITS)
    for j in tl.static_range(PLANES):
        even, odd = plane_floats(word, upper, j, BITS, COMPILED)
        codes = interleave(even, odd)
        k = tile * PLANES * LANES + j * WIDTH + position
        if WIDTH == LANES:
            group = tl.minimum((tile * PLANES * LANES + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
            scale = tl.load(scales + group * N + row).to(tl.float32)[:, None]
            zero = tl.load(zeros + group * N + row).to(tl.float32)[:, None]
        else:
            groups = tl.minimum(k // GROUP, GROUPS - 1) if GROUP else k * 0
            scale = tl.load(scales + groups[None, :] * N + row[:, None]).to(tl.float32)
            zero = tl.load(zeros + groups[None, :] * N + row[:, None]).to(tl.float32)
        # The bias of the code comes off first: it is exact, while zero + bias is not.
        weight = ((codes - CODE_BIAS) - zero) * scale
        mask = (rn[:, None] < N) & (k[None, :] < K)
        tl.store(out + rn.to(tl.int64)[:, None] * K + k[None, :], weight.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_partials(
    partials,
    bias,
    out,
    MN,
    N,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid cdiv(MN, BLOCK): out [M, N] = Σ over the SPLIT parts, always in the same order, plus bias.

    ACTIVATION: None, or that of the first half of the columns, by which the second half is multiplied; out is
    then [M, N/2], the grid cdiv(MN/2, BLOCK).
    """
    let_next_start(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait_for_earlier(PDL)
    if ACTIVATION is not None:
        mask = at < MN // 2
        column = at % (N // 2)
        first = at // (N // 2) * N + column
        gate = _sum_parts(partials, bias, first, column, mask, MN, SPLIT, HAS_BIAS, BLOCK)
        first += N // 2
        column += N // 2
        up = _sum_parts(partials, bias, first, column, mask, MN, SPLIT, HAS_BIAS, BLOCK)
        y = activated(gate, up, ACTIVATION, out.dtype.element_ty)
    else:
        mask = at < MN
        y = _sum_parts(partials, bias, at, at % N, mask, MN, SPLIT, HAS_BIAS, BLOCK)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_parts(
    partials, bias, at, column, mask, MN, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        y += tl.load(partials + part * MN + at, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return y
