"""Body and tail for many tokens in one launch, the weight on the left: yᵀ [BN, BM] = W [BN, K] · xᵀ [K, BM].

The tail is summed first, in float32, from xᵀ, where the tokens of a column lie side by side; the dots of
the body go on from there. Up to 32 tokens the dots take codes as they are, or-ed into a power of two, and
Σ (power + code)·x − (power + zero)·Σ x is scaled per group; beyond, that would cost more than scaling
every weight, as the affine GEMM does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.affine_codes import (
    dequantize_plane,
    interleave,
    plane_bits,
    spread_high,
)
from qcompiler.kernels.triton.linear.body_tail_slots import tail_slots


@triton.jit
def _x_tile(x, x_rows, k, rm, M, K, EVEN_K: tl.constexpr, COMPILED: tl.constexpr):
    """xᵀ at columns k of tokens rm, zero outside of x."""
    mask = rm[None, :] < M
    if not EVEN_K:
        mask = mask & (k[:, None] < K)
    tile = tl.load(x + x_rows[None, :] + k[:, None], mask=mask, other=0.0)
    return tile if COMPILED else tile.to(tl.float32)


@triton.jit
def _biased_codes(low, high, j: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """Codes of plane j plus 128 (bf16) or 1024 (fp16), which is what they are or-ed into, as HALF."""
    MAGIC: tl.constexpr = 0x43004300 if HALF == tl.bfloat16 else 0x64006400
    pair = plane_bits(low, high, j, BITS, MAGIC, COMPILED)
    even = (pair & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
    odd = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    codes = interleave(even, odd)
    return codes if COMPILED else codes.to(tl.float32)


@triton.jit
def _scale_and_offset(scales, zeros, at, CENTRE: tl.constexpr):
    """Scale and (centre − zero)·scale, float32."""
    scale = tl.load(scales + at).to(tl.float32)
    return scale, (CENTRE - tl.load(zeros + at).to(tl.float32)) * scale


@triton.jit
def linear_body_tail_gemm(
    x,
    xt,
    x_sums,
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
    xt_stride,
    tiles_per_split,
    slots_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL_BITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT); yᵀ [BN, BM].

    x [M, K] rows x_stride apart; xt and x_sums from `prepare_x_kernel`, xt_stride a multiple of BM.
    out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N] when SPLIT > 1. TS slots of the tail are
    gathered together.
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16  # a dot needs 16 columns of K
    BLOCK: tl.constexpr = PLANES * WIDTH
    TILE: tl.constexpr = PLANES * LANES
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    POWER: tl.constexpr = 128.0 if HALF == tl.bfloat16 else 1024.0
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    ONE_BLOCK: tl.constexpr = WIDTH == LANES
    # Few tokens: bare codes enter the dots of a group, its scale comes after. Else every weight is scaled.
    AFTER: tl.constexpr = ONE_BLOCK and BITS < 8 and BM <= 32 and GROUP > 0 and GROUP <= BLOCK
    PER: tl.constexpr = GROUP // WIDTH if AFTER else PLANES

    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    pid_n = (pid // tiles_m).to(tl.int64)
    pid_m = (pid % tiles_m).to(tl.int64)
    rn = (pid_n * BN + tl.arange(0, BN)).to(tl.int32)
    rm = (pid_m * BM + tl.arange(0, BM)).to(tl.int32)
    # Rows past the end read the last row and are not stored, so that no load of the weight needs a mask.
    row = tl.minimum(rn, N - 1)

    first_slot = split * slots_per_split
    last_slot = tl.minimum(first_slot + slots_per_split, slots)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(first_slot, last_slot, TS):
        # Rows first: their lanes are neighbours then, and a thread sums its slots by itself.
        t = (start + tl.arange(0, TS))[None, :]
        k, factor, used = tail_slots(tail, t, row[:, None], last_slot, N, K, SLOTS, COLUMNS, TAIL_BITS)
        at = xt + (k.to(tl.int64) * xt_stride)[:, :, None] + rm[None, None, :]
        value = tl.load(at, mask=used[:, :, None], other=0.0).to(tl.float32)
        acc += tl.sum(factor[:, :, None] * value, axis=1)
    acc *= tl.load(tail_scales + row).to(tl.float32)[:, None]

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
    for tile in range(first, last):
        at = tile * (LANES // 2) + column
        if not ONE_BLOCK:
            at = tl.minimum(at, words - 1)
        word = tl.load(low + word_rows + at[None, :])
        upper = word
        if HAS_HIGH:
            upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
        if AFTER:
            for j in tl.static_range(0, PLANES, PER):
                dots = tl.zeros((BN, BM), dtype=tl.float32)
                for i in tl.static_range(PER):
                    k = tile * TILE + (j + i) * WIDTH + lane
                    x_tile = _x_tile(x, x_rows, k, rm, M, K, EVEN_K, COMPILED)
                    codes = _biased_codes(word, upper, j + i, BITS, HALF, COMPILED)
                    dots = tl.dot(codes, x_tile, dots, input_precision="ieee")
                group = tl.minimum((tile * TILE + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
                scale = tl.load(scales + group * N + row).to(tl.float32)
                zero = tl.load(zeros + group * N + row).to(tl.float32) + POWER
                total = tl.load(x_sums + group * xt_stride + rm)
                acc += scale[:, None] * (dots - zero[:, None] * total[None, :])
        else:
            for j in tl.static_range(PLANES):
                k = tile * TILE + j * WIDTH + position
                x_tile = _x_tile(x, x_rows, k, rm, M, K, EVEN_K, COMPILED)
                if ONE_BLOCK:
                    group = tl.minimum((tile * TILE + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
                    scale, offset = _scale_and_offset(scales, zeros, group * N + row, CENTRE)
                    scale = scale[:, None]
                    offset = offset[:, None]
                else:
                    first_k = tile * TILE + j * WIDTH + pair_position
                    groups = tl.minimum(first_k // GROUP, GROUPS - 1) if GROUP else first_k * 0
                    scale, offset = _scale_and_offset(
                        scales, zeros, groups[None, :] * N + row[:, None], CENTRE
                    )
                weight = dequantize_plane(word, upper, scale, offset, j, BITS, HALF, COMPILED)
                acc = tl.dot(weight, x_tile, acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    out += split.to(tl.int64) * M * N + pid_m * BM * N
    offsets = tl.arange(0, BM).to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))
