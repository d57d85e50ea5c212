"""Affine GEMV for one to four tokens: y [M, N] = x · Wᵀ on the float32 units, memory bound.

A thread reads 16 bytes of codes (four words) of each of its rows; each word
holds two neighbouring codes of every plane. A code becomes a float by or-ing
it below the exponent of 128; the odd one of a pair is used with the even one
still in its lower mantissa bits, which adds 2^-16 of a step per code and
saves an instruction: constant parts of both go into the start of each sum.
Per group and thread: t = Σ (code − 2^(bits−1))·x, then sum += scale·t + offset·Σ x.

Instructions per 4-bit weight for sm_90, counted in SASS (triton 3.6): 3.7.
Rows are separate tensors, not a dimension of one: so narrow and wide loads
come in the same layout, and nothing goes through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.activation import activated
from qcompiler.kernels.triton.launch import let_next_start, prefetch, wait_for_earlier
from qcompiler.kernels.triton.linear.affine_codes import plane_bits, quad_bytes, spread_high
from qcompiler.kernels.triton.linear.x_pairs import pair_floats


@triton.jit
def quad(t):
    """[A, 4·B] to four [A, B]: elements 4i, 4i + 1, 4i + 2 and 4i + 3; free where a thread has all four."""
    return quad_of(tl.reshape(t, (t.shape[0], t.shape[1] // 4, 4)))


@triton.jit
def quad_of(t):
    """[A, B, 4] to four [A, B]."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], t.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _word_floats(word, upper, j: tl.constexpr, BITS: tl.constexpr, COMPILED: tl.constexpr):
    """Codes 2i and 2i+1 of plane j as float32, off by the constants that `_start` takes off again."""
    if BITS == 8:
        return quad_bytes(word, j, COMPILED)
    else:
        pair = plane_bits(word, upper, j, BITS, 0x43004300, COMPILED)
        return (pair << 16).to(tl.float32, bitcast=True), pair.to(tl.float32, bitcast=True)


@triton.jit
def _load_sides(row, block, SIDES: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr):
    """The SIDES scale-and-offset pairs of one row's blocks of CODES codes, each of the shape of `block`."""
    if SIDES == 1:
        if GROUP:
            return (tl.load(row + block * CODES // GROUP),)
        else:
            return (tl.load(row + block * 0),)
    elif SIDES == 2:
        return tl.split(tl.load(row + block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]))
    elif SIDES == 4:
        return quad_of(tl.load(row + block[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]))
    else:
        half = row + block[:, :, None] * 8 + tl.arange(0, 4)[None, None, :]
        return quad_of(tl.load(half)) + quad_of(tl.load(half + 4))


@triton.jit
def _sum_rows(sums, FIRST: tl.constexpr, BN: tl.constexpr):
    """Σ along the columns of BN of the tensors [1, columns], from number FIRST on, as [BN]."""
    if BN == 1:
        return tl.sum(sums[FIRST], axis=1)
    else:
        return tl.reshape(tl.sum(_join_rows(sums, FIRST, BN, 1), axis=1), (BN,))


@triton.jit
def _join_rows(sums, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """Every STEP-th of the tensors, COUNT of them, a power of two, in new last dimensions of two each."""
    if COUNT == 2:
        return tl.join(sums[FIRST], sums[FIRST + STEP])
    else:
        # The last dimension is the lowest bit of the number.
        even = _join_rows(sums, FIRST, COUNT // 2, 2 * STEP)
        return tl.join(even, _join_rows(sums, FIRST + STEP, COUNT // 2, 2 * STEP))


@triton.jit
def linear_affine_quads(
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
    words_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDES: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT); M ≤ BM; WIDTH ≥ 8.

    x [M, K/2] int32, pairs of 16-bit values, rows x_stride pairs apart; K even. sides [N, side_stride], SIDES
    of them per block. BW words of a row at a time. EVEN: BW divides the words of every split, and no code is
    padding. out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N] when SPLIT > 1.
    ACTIVATION: None or that of the first half of the rows, by which the second half is multiplied; out is
    then [M, N/2] and SPLIT 1. PDL: see `launch.py`; the weights fetched soon are those of the first step.
    """
    let_next_start(PDL)
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    # What a float of `_word_floats` has too much: 8 bits: nothing; else 128, and for the odd code its even
    # neighbour's half word read as 2^-16 units, on average 0x4300 + CENTRE.
    TOO_MUCH: tl.constexpr = 0.0 if BITS == 8 else 128.0 + CENTRE
    ODD_TOO_MUCH: tl.constexpr = 0.0 if BITS == 8 else (0x4300 + CENTRE) / 65536.0

    split = tl.program_id(1)
    # Rows of a program: BN neighbours, or BN/2 gates and the BN/2 rows that go with them.
    OWN: tl.constexpr = BN // 2 if ACTIVATION is not None else BN
    channels = N // 2 if ACTIVATION is not None else N
    first_row = tl.program_id(0) * OWN
    if PDL == 2:
        number = tl.arange(0, BN)[:, None]
        soon = tl.minimum(first_row + number % OWN, channels - 1) + number // OWN * channels
        sector = tl.minimum(split * words_per_split + tl.arange(0, BW // 8)[None, :] * 8, words - 1)
        prefetch(low + soon.to(tl.int64) * words + sector)
    wait_for_earlier(PDL)
    sums = ()
    for _ in tl.static_range(BM * BN):
        sums = sums + (tl.zeros((1, BW // 4), dtype=tl.float32),)  # type: ignore[assignment]
    for start in tl.range(0, words_per_split, BW, num_stages=STAGES):
        first = split * words_per_split + start
        at = first + tl.arange(0, BW)[None, :]
        held = at if EVEN else tl.minimum(at, words - 1)
        # All words of a quad lie in one block.
        four = first // 4 + tl.arange(0, BW // 4)[None, :]
        block = (four if EVEN else tl.minimum(four, words // 4 - 1)) // (WIDTH // 8)
        rows = ()
        for r in tl.static_range(BN):
            row = (tl.minimum(first_row + r % OWN, channels - 1) + r // OWN * channels).to(tl.int64)
            word = quad(tl.load(low + row * words + held, eviction_policy="evict_first"))
            upper = word
            if HAS_HIGH:
                upper = quad(spread_high(tl.load(high + row * words + held), BITS))
            of_row = _load_sides(sides + row * side_stride, block, SIDES, PLANES * WIDTH, GROUP)
            rows = rows + ((word, upper, of_row),)  # type: ignore[assignment]
        for j in tl.static_range(PLANES):
            pair = at // (WIDTH // 2) * (PLANES * WIDTH // 2) + j * (WIDTH // 2) + at % (WIDTH // 2)
            grown = ()
            for m in tl.static_range(BM):
                x_row = x + tl.minimum(m, M - 1) * x_stride
                if EVEN:
                    xx = quad(tl.load(x_row + pair))
                else:
                    inside = (at < words) & (2 * pair < K) & (at < (split + 1) * words_per_split)
                    xx = quad(tl.load(x_row + pair, mask=inside, other=0))
                e0, o0 = pair_floats(xx[0], HALF)
                e1, o1 = pair_floats(xx[1], HALF)
                e2, o2 = pair_floats(xx[2], HALF)
                e3, o3 = pair_floats(xx[3], HALF)
                odds = (o0 + o1) + (o2 + o3)
                total = ((e0 + e1) + (e2 + e3)) + odds
                begin = -(TOO_MUCH * total + ODD_TOO_MUCH * odds)
                for r in tl.static_range(BN):
                    even, odd = _word_floats(rows[r][0][0], rows[r][1][0], j, BITS, COMPILED)
                    t = even * e0 + begin
                    t += odd * o0
                    even, odd = _word_floats(rows[r][0][1], rows[r][1][1], j, BITS, COMPILED)
                    t += even * e1
                    t += odd * o1
                    even, odd = _word_floats(rows[r][0][2], rows[r][1][2], j, BITS, COMPILED)
                    t += even * e2
                    t += odd * o2
                    even, odd = _word_floats(rows[r][0][3], rows[r][1][3], j, BITS, COMPILED)
                    t += even * e3
                    t += odd * o3
                    side = rows[r][2][j * WIDTH // GROUP] if SIDES > 1 else rows[r][2][0]  # type: ignore[var-annotated]
                    scale, offset = pair_floats(side, HALF)
                    grown = grown + (sums[m * BN + r] + (scale * t + offset * total),)  # type: ignore[assignment]
            sums = grown

    out += split.to(tl.int64) * M * N
    rn = first_row + tl.arange(0, OWN)
    kept = tl.minimum(rn, channels - 1)
    for m in tl.static_range(BM):
        y = _sum_rows(sums, m * BN, OWN)
        if HAS_BIAS:
            y += tl.load(bias + kept).to(tl.float32)
        if ACTIVATION is not None:
            times = _sum_rows(sums, m * BN + OWN, OWN)
            if HAS_BIAS:
                times += tl.load(bias + channels + kept).to(tl.float32)
            y = activated(y, times, ACTIVATION, out.dtype.element_ty)
        tl.store(out + m * channels + rn, y.to(out.dtype.element_ty), mask=(rn < channels) & (m < M))
