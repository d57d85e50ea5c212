"""The kernels of `qcompiler::linear_int8`: GEMV, GEMM with the weight on the left, and the dense weight.

A unit is what one load brings: an int32 of four codes, or a single code where rows are no multiple
of four bytes. Codes become floats without an int-to-float conversion, which runs at a quarter of
the rate: with the sign bit flipped a byte in the mantissa of 2^23 reads as 2^23 + 128 + code. They
enter the product exactly; the scale comes once, at the end. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.x_pairs import load_pair, pair_row

# $0, $1: codes (0, 1) and (2, 3) of the word $2 as pairs of halves.
PAIRS_BFLOAT16 = """{
.reg .b32 u, a, b; .reg .f32 f, g;
xor.b32 u, $2, 0x80808080;
prmt.b32 a, u, 0x4B000000, 0x7650; prmt.b32 b, u, 0x4B000000, 0x7651;
mov.b32 f, a; mov.b32 g, b; sub.f32 f, f, 0f4B000080; sub.f32 g, g, 0f4B000080;
cvt.rn.bf16x2.f32 $0, g, f;
prmt.b32 a, u, 0x4B000000, 0x7652; prmt.b32 b, u, 0x4B000000, 0x7653;
mov.b32 f, a; mov.b32 g, b; sub.f32 f, f, 0f4B000080; sub.f32 g, g, 0f4B000080;
cvt.rn.bf16x2.f32 $1, g, f;
}"""
# fp16 has room for a byte in the mantissa of 1024, so a pair takes one PRMT and one subtraction of 1152.
PAIRS_FLOAT16 = """{
.reg .b32 u, a, b, c;
xor.b32 u, $2, 0x80808080;
mov.b32 c, 0x64806480;
prmt.b32 a, u, 0x64006400, 0x5150; prmt.b32 b, u, 0x64006400, 0x5352;
sub.rn.f16x2 $0, a, c; sub.rn.f16x2 $1, b, c;
}"""


@triton.jit
def _byte_value(word, byte: tl.constexpr, COMPILED: tl.constexpr):
    """float32 of the signed byte; `word` has all sign bits flipped."""
    if COMPILED:
        SELECT: tl.constexpr = (
            "prmt.b32 $0, $1, 0x4B000000, " + ("0x7650;", "0x7651;", "0x7652;", "0x7653;")[byte]
        )
        bits = tl.inline_asm_elementwise(SELECT, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = ((word >> (8 * byte)) & 0xFF) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def linear_int8_gemv(
    x,
    units,
    scales,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    tiles_per_split,
    PER: tl.constexpr,
    BN: tl.constexpr,
    UNITS: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT, M).

    x [M, K] of any float dtype, rows x_stride apart (or the same memory as int32, with
    PAIRS); out [M, N], or float32 partial sums [SPLIT, M, N].
    """
    token = tl.program_id(2)
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    per_row = K // PER
    unit_rows = row.to(tl.int64)[:, None] * per_row
    column = tl.arange(0, UNITS)
    x_row = pair_row(x, token, x_stride, PAIRS)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(per_row, UNITS))
    acc = tl.zeros((BN, UNITS), dtype=tl.float32)
    for tile in range(first, last):
        unit = tile * UNITS + column
        # Units past the end read the last one and meet zeros of x: no load of the weight needs a mask.
        if EVEN_K:
            inside = unit
            in_row = None
        else:
            inside = tl.minimum(unit, per_row - 1)
            in_row = unit < per_row
        codes = tl.load(units + unit_rows + inside[None, :], eviction_policy="evict_first")
        if PER == 1:
            xv = tl.load(x_row + unit, mask=unit < per_row, other=0.0).to(tl.float32)
            acc += codes.to(tl.float32) * xv[None, :]
        else:
            flipped = codes ^ -2139062144  # 0x80808080
            for j in tl.static_range(2):
                even, odd = load_pair(x_row, unit * 2 + j, in_row, PAIRS, HALF)
                acc += _byte_value(flipped, 2 * j, COMPILED) * even[None, :]
                acc += _byte_value(flipped, 2 * j + 1, COMPILED) * odd[None, :]
    y = tl.sum(acc, axis=1) * tl.load(scales + row).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)
    out += (split.to(tl.int64) * M + token) * N
    tl.store(out + rn, y.to(out.dtype.element_ty), mask=rn < N)


@triton.jit
def int8_tiles(
    x,
    x_rows,
    in_rows,
    units,
    unit_rows,
    first,
    last,
    K,
    PER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """float32 yᵀ [BN, BM] = codes · xᵀ over the tiles of units from `first` to `last`; no scales yet.

    `x_rows`, `in_rows` [1, BM] are offsets of rows of x and which of them count; `unit_rows` [BN, 1] those
    of the weight's rows. With words (PER 4) codes 2j and 2j+1 of every word meet the same columns of x in
    one dot. DECODE is one of the two PTX blocks above, or "" (in the interpreter, for single codes, for
    float32 x).
    """
    per_row = K // PER
    column = tl.arange(0, UNITS)
    PAIR: tl.constexpr = 2 if PER == 4 else 1
    lane = tl.arange(0, PAIR * UNITS)
    position = lane // PAIR * PER + lane % PAIR
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for tile in range(first, last):
        unit = tile * UNITS + column
        if not EVEN_K:
            unit = tl.minimum(unit, per_row - 1)
        codes = tl.load(units + unit_rows + unit[None, :])
        if DECODE != "":
            pairs = tl.inline_asm_elementwise(
                DECODE, "=r,=r,r", [codes], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        for j in tl.static_range(PER // PAIR):
            k = tile * UNITS * PER + PAIR * j + position
            x_mask = in_rows
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows + k[:, None], mask=x_mask, other=0.0)
            if DECODE != "":
                even = (pairs[j] & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
                odd = (pairs[j] >> 16).to(tl.int16).to(HALF, bitcast=True)
                acc = tl.dot(tl.reshape(tl.join(even, odd), (BN, 2 * UNITS)), xt, acc)
            elif PER == 4:
                even = _byte_value(codes ^ -2139062144, 2 * j, False)
                odd = _byte_value(codes ^ -2139062144, 2 * j + 1, False)
                weight = tl.reshape(tl.join(even, odd), (BN, 2 * UNITS))
                acc = tl.dot(weight, xt.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(codes.to(tl.float32), xt.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def linear_int8_gemm(
    x,
    units,
    scales,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    tiles_per_split,
    PER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT); yᵀ [BN, BM] = codes · xᵀ (`int8_tiles`), then the scales.

    x [M, K] in HALF, rows x_stride apart; out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N].
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    rn = (pid // tiles_m) * BN + tl.arange(0, BN)
    pid_m = (pid % tiles_m).to(tl.int64)
    rm = (pid % tiles_m) * BM + tl.arange(0, BM)
    row = tl.minimum(rn, N - 1)
    unit_rows = row.to(tl.int64)[:, None] * (K // PER)
    x += pid_m * BM * x_stride
    x_rows = tl.arange(0, BM)[None, :] * x_stride
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K // PER, UNITS))
    acc = int8_tiles(
        x, x_rows, rm[None, :] < M, units, unit_rows, first, last, K, PER, BN, BM, UNITS, EVEN_K, HALF, DECODE
    )
    acc *= tl.load(scales + row).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    out += (split.to(tl.int64) * M + pid_m * BM) * N
    offsets = tl.arange(0, BM).to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))


@triton.jit
def dequantize_int8_kernel(codes, scales, out, K, BLOCK: tl.constexpr):
    """Grid (N, cdiv(K, BLOCK)): the dense weight [N, K] in out's dtype, rounded once."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * K + k
    value = tl.load(codes + at, mask=k < K, other=0).to(tl.float32) * tl.load(scales + row).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=k < K)
