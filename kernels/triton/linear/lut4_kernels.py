"""The kernels of `qcompiler::linear_lut4`: GEMV, GEMM with the weight on the left, and the dense weight.

A unit is what one load brings: an int32 of eight codes, or a byte of two where rows are no multiple
of eight codes. The GEMV takes float32 table values, so that no weight is rounded; the GEMM rounds
table and absmax to the dtype of x for the tensor cores. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.lut4_codes import (
    code_value,
    interleave,
    part_of_rows,
    scaled_pair,
    unit_scales,
    word_values,
)
from qcompiler.kernels.triton.linear.x_pairs import load_pair, pair_row


@triton.jit
def linear_lut4_gemv(
    x,
    units,
    values,
    absmax,
    nested_absmax,
    nested_offset,
    part_rows,
    steps,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    tiles_per_split,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PARTS: tl.constexpr,
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

    x [M, K] rows x_stride apart (or the same memory as int32, with PAIRS);
    out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N].
    """
    token = tl.program_id(2)
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    local, first_block, first_nested, offset = part_of_rows(
        row, part_rows, nested_offset, K, BLOCK, PARTS, DOUBLE
    )
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
        codes = tl.load(units + unit_rows + inside[None, :], eviction_policy="evict_first").to(tl.int32)
        scale = unit_scales(
            absmax, nested_absmax, steps, local, first_block, first_nested, offset, inside, tile * UNITS, K,
            BN, UNITS, PER, BLOCK, CROSS, DOUBLE,
        )  # fmt: skip
        if PER == 8:
            weights = word_values(values, codes, COMPILED)
        else:
            weights = (code_value(values, codes, 0), code_value(values, codes, 1))
        product = tl.zeros((BN, UNITS), dtype=tl.float32)
        for j in tl.static_range(PER // 2):
            even, odd = load_pair(x_row, unit * (PER // 2) + j, in_row, PAIRS, HALF)
            product += weights[2 * j] * even[None, :]
            product += weights[2 * j + 1] * odd[None, :]
        acc += product * scale
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)
    out += (split.to(tl.int64) * M + token) * N
    tl.store(out + rn, y.to(out.dtype.element_ty), mask=rn < N)


@triton.jit
def lut4_tiles(
    x,
    x_rows,
    in_rows,
    units,
    unit_rows,
    values,
    absmax,
    nested_absmax,
    steps,
    local,
    first_block,
    first_nested,
    offset,
    first,
    last,
    K,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """float32 yᵀ [BN, BM] = W · xᵀ over the tiles of units from `first` to `last`.

    `x_rows`, `in_rows` [1, BM] are offsets of rows of x and which of them count; `unit_rows` [BN, 1] those
    of the weight's rows; `local` to `offset` [BN] as `part_of_rows` gives them. A tile of UNITS units is
    PER/2 small dots: codes 2j and 2j+1 of every unit meet the same columns of x. DECODE is the PTX of
    `decode_asm`, or "" (in the interpreter, for bytes, for float32 x): values come from the table.
    """
    per_row = K // PER
    column = tl.arange(0, UNITS)
    lane = tl.arange(0, 2 * UNITS)
    position = lane // 2 * PER + lane % 2
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for tile in range(first, last):
        unit = tile * UNITS + column
        if not EVEN_K:
            unit = tl.minimum(unit, per_row - 1)
        codes = tl.load(units + unit_rows + unit[None, :]).to(tl.int32)
        scale = unit_scales(
            absmax, nested_absmax, steps, local, first_block, first_nested, offset, unit, tile * UNITS, K,
            BN, UNITS, PER, BLOCK, CROSS, DOUBLE,
        )  # fmt: skip
        if DECODE != "":
            pairs = tl.inline_asm_elementwise(
                DECODE, "=r,=r,=r,=r,r", [codes],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        for j in tl.static_range(PER // 2):
            k = tile * UNITS * PER + 2 * j + position
            x_mask = in_rows
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows + k[:, None], mask=x_mask, other=0.0)
            if DECODE != "":
                acc = tl.dot(scaled_pair(pairs[j], scale, HALF), xt, acc)
            else:
                even = code_value(values, codes, 2 * j) * scale
                odd = code_value(values, codes, 2 * j + 1) * scale
                acc = tl.dot(interleave(even, odd), xt.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def linear_lut4_gemm(
    x,
    units,
    values,
    absmax,
    nested_absmax,
    nested_offset,
    part_rows,
    steps,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    tiles_per_split,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT); yᵀ [BN, BM] = W · xᵀ, see `lut4_tiles`.

    x [M, K] in HALF, rows x_stride apart; out [M, N] in x's dtype, or float32 partial sums [SPLIT, M, N].
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    rn = (pid // tiles_m) * BN + tl.arange(0, BN)
    pid_m = (pid % tiles_m).to(tl.int64)
    rm = (pid % tiles_m) * BM + tl.arange(0, BM)
    row = tl.minimum(rn, N - 1)
    local, first_block, first_nested, offset = part_of_rows(
        row, part_rows, nested_offset, K, BLOCK, PARTS, DOUBLE
    )
    unit_rows = row.to(tl.int64)[:, None] * (K // PER)
    x += pid_m * BM * x_stride
    x_rows = tl.arange(0, BM)[None, :] * x_stride
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K // PER, UNITS))
    acc = lut4_tiles(
        x, x_rows, rm[None, :] < M, units, unit_rows, values, absmax, nested_absmax, steps,
        local, first_block, first_nested, offset, first, last, K,
        PER, BLOCK, CROSS, DOUBLE, BN, BM, UNITS, EVEN_K, HALF, DECODE,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    out += (split.to(tl.int64) * M + pid_m * BM) * N
    offsets = tl.arange(0, BM).to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))


@triton.jit
def dequantize_lut4_kernel(
    units,
    values,
    absmax,
    nested_absmax,
    nested_offset,
    part_rows,
    steps,
    out,
    N,
    K,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Grid (cdiv(K, UNITS·PER), cdiv(N, BN)): the dense weight [N, K] in out's dtype, rounded once."""
    tile = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    local, first_block, first_nested, offset = part_of_rows(
        row, part_rows, nested_offset, K, BLOCK, PARTS, DOUBLE
    )
    per_row = K // PER
    unit = tl.minimum(tile * UNITS + tl.arange(0, UNITS), per_row - 1)
    codes = tl.load(units + row.to(tl.int64)[:, None] * per_row + unit[None, :]).to(tl.int32)
    scale = unit_scales(
        absmax, nested_absmax, steps, local, first_block, first_nested, offset, unit, tile * UNITS, K,
        BN, UNITS, PER, BLOCK, CROSS, DOUBLE,
    )  # fmt: skip
    even = code_value(values, codes, 0) * scale
    odd = code_value(values, codes, 1) * scale
    if PER == 8:
        even = tl.join(
            tl.join(even, code_value(values, codes, 4) * scale),
            tl.join(code_value(values, codes, 2) * scale, code_value(values, codes, 6) * scale),
        )
        odd = tl.join(
            tl.join(odd, code_value(values, codes, 5) * scale),
            tl.join(code_value(values, codes, 3) * scale, code_value(values, codes, 7) * scale),
        )
    weight = tl.reshape(tl.join(even, odd), (BN, UNITS * PER))
    k = tile * UNITS * PER + tl.arange(0, UNITS * PER)
    mask = (rn[:, None] < N) & (k[None, :] < K)
    tl.store(out + rn.to(tl.int64)[:, None] * K + k[None, :], weight.to(out.dtype.element_ty), mask=mask)
