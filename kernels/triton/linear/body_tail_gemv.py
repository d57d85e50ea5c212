"""Body and tail for few tokens in one launch, on the float32 units.

Σ (128 + code)·x and Σ x are formed per group and joined as scale·(Σ (128 + code)·x − (128 + zero)·Σ x), so
codes stay exact. Blocks of the body stand on an axis of their own: a scale is loaded once per group and
row, words are summed in the thread that holds them before a scale is applied, and x, once converted, serves
several rows. The words of the next step are under way while those of this one are used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.affine_codes import plane_floats, spread_high
from qcompiler.kernels.triton.linear.body_tail_slots import tail_slots
from qcompiler.kernels.triton.linear.x_pairs import load_pair


@triton.jit
def _x_of(x, pairs, pair, K, PAIRS: tl.constexpr, EVEN: tl.constexpr, HALF: tl.constexpr):
    """x[2·pair] and x[2·pair + 1] of one token as float32, zero from K on; EVEN: nothing is past K."""
    if PAIRS:
        return load_pair(pairs, pair, None if EVEN else 2 * pair < K, PAIRS, HALF)
    else:
        even = tl.load(x + 2 * pair, mask=2 * pair < K, other=0.0)
        odd = tl.load(x + 2 * pair + 1, mask=2 * pair + 1 < K, other=0.0)
        return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _words(low, high, at, HAS_HIGH: tl.constexpr):
    """Words of the body and, where codes have upper bits, their narrow words."""
    word = tl.load(low + at, eviction_policy="evict_first")
    if HAS_HIGH:
        return word, tl.load(high + at, eviction_policy="evict_first")
    else:
        return word, word


@triton.jit
def _sum_words(values, VEC: tl.constexpr):
    """Sums of VEC neighbouring words, those of one thread: [..., words] to [..., words / VEC]."""
    if len(values.shape) == 3:
        parts = tl.reshape(values, (values.shape[0], values.shape[1], values.shape[2] // VEC, VEC))
        return tl.sum(parts, axis=3)
    else:
        parts = tl.reshape(values, (values.shape[0], values.shape[1] // VEC, VEC))
        return tl.sum(parts, axis=2)


@triton.jit
def linear_body_tail_gemv(
    x,
    pairs,
    low,
    high,
    scales,
    zeros,
    tail,
    tail_scales,
    bias,
    out,
    M,
    N,
    K,
    GROUPS,
    words,
    slots,
    x_stride,
    steps_per_split,
    slots_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL_BITS: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    KB: tl.constexpr,
    TS: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT, M).

    x [M, K] rows x_stride apart, and with PAIRS the same memory as int32. EVEN: K is whole steps.
    out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N] when SPLIT > 1. A step is KB blocks of
    the body for BN rows, ROWS at a time; TS slots are read together; a tail block has SLOTS slots and
    COLUMNS columns.
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    BLOCK: tl.constexpr = PLANES * WIDTH
    PER: tl.constexpr = PLANES if GROUP == 0 or GROUP >= BLOCK else GROUP // WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    CODE_BIAS: tl.constexpr = -128.0 if BITS == 8 else 128.0
    PARTS: tl.constexpr = BN // ROWS
    # What a thread loads together: 16 bytes of the narrowest words.
    VEC: tl.constexpr = min(WIDTH // 2, 8 if HAS_HIGH else 4)

    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * BN
    x += token * x_stride
    if PAIRS:
        pairs += token * (x_stride // 2)

    out += (split.to(tl.int64) * M + token) * N
    first_slot = split * slots_per_split
    last_slot = tl.minimum(first_slot + slots_per_split, slots)
    rows = ()
    ends = ()
    for part in tl.static_range(PARTS):
        rows = rows + (tl.minimum(first_row + part * ROWS + tl.arange(0, ROWS), N - 1),)  # type: ignore[assignment]
        ends = ends + (tl.zeros((ROWS, TS), dtype=tl.float32),)  # type: ignore[assignment]
    for start in range(first_slot, last_slot, TS):
        t = (start + tl.arange(0, TS))[None, :]
        grown = ()
        for part in tl.static_range(PARTS):
            row = rows[part][:, None]  # type: ignore[var-annotated]
            k, factor, used = tail_slots(tail, t, row, last_slot, N, K, SLOTS, COLUMNS, TAIL_BITS)
            value = tl.load(x + k, mask=used, other=0.0).to(tl.float32)
            grown = grown + (ends[part] + factor * value,)  # type: ignore[assignment]
        ends = grown

    block = tl.arange(0, KB)
    column = tl.arange(0, WIDTH // 2)
    blocks = words // (WIDTH // 2)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(blocks, KB))
    at = tl.minimum(first * KB + block, blocks - 1)[None, :, None] * (WIDTH // 2)
    bases = ()
    sums = ()
    ahead = ()
    for part in tl.static_range(PARTS):
        bases = bases + ((rows[part].to(tl.int64) * words)[:, None, None] + column[None, None, :],)  # type: ignore[assignment]
        sums = sums + (tl.zeros((ROWS, KB, WIDTH // 2 // VEC), dtype=tl.float32),)
        ahead = ahead + (_words(low, high, bases[part] + at, HAS_HIGH),)
    for step in range(first, last):
        here = ahead
        at = tl.minimum((step + 1) * KB + block, blocks - 1)[None, :, None] * (WIDTH // 2)
        ahead = ()
        for part in tl.static_range(PARTS):
            ahead = ahead + (_words(low, high, bases[part] + at, HAS_HIGH),)  # type: ignore[assignment]
        uppers = ()
        for part in tl.static_range(PARTS):
            uppers = uppers + (spread_high(here[part][1], BITS) if HAS_HIGH else here[part][1],)  # type: ignore[assignment]
        base = (step * KB + block) * BLOCK
        for j in tl.static_range(0, PLANES, PER):
            group = tl.minimum((base + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else base * 0
            products = ()
            for i in tl.static_range(PER):
                pair = ((base + (j + i) * WIDTH) // 2)[:, None] + column[None, :]
                even_x, odd_x = _x_of(x, pairs, pair, K, PAIRS, EVEN, HALF)
                if i == 0:
                    total = even_x + odd_x
                else:
                    total += even_x + odd_x
                grown = ()
                for part in tl.static_range(PARTS):
                    even, odd = plane_floats(here[part][0], uppers[part], j + i, BITS, COMPILED)
                    if i == 0:
                        product = even * even_x[None] + odd * odd_x[None]
                    else:
                        product = products[part] + even * even_x[None] + odd * odd_x[None]
                    grown = grown + (product,)  # type: ignore[assignment]
                products = grown
            total = _sum_words(total, VEC)
            grown = ()
            for part in tl.static_range(PARTS):
                at_scale = group[None, :] * N + rows[part][:, None]
                scale = tl.load(scales + at_scale).to(tl.float32)[:, :, None]
                zero = (tl.load(zeros + at_scale).to(tl.float32) + CODE_BIAS)[:, :, None]
                product = _sum_words(products[part], VEC) - zero * total[None]
                grown = grown + (sums[part] + scale * product,)  # type: ignore[assignment]
            sums = grown

    for part in tl.static_range(PARTS):
        row = rows[part]
        y = tl.sum(tl.sum(sums[part], axis=2), axis=1)
        y += tl.sum(ends[part], axis=1) * tl.load(tail_scales + row).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + row).to(tl.float32)
        rn = first_row + part * ROWS + tl.arange(0, ROWS)
        tl.store(out + rn, y.to(out.dtype.element_ty), mask=rn < N)
