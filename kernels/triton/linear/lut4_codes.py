"""Decoding of the lut4 format inside Triton kernels: codes to table values, blocks to their absmax.

Half-precision values come from two byte tables in registers: PRMT picks four bytes at once, indexed
by four codes; one PRMT each for codes 0-7 and 8-15 of the upper and of the lower bytes, two more by
the codes' top bits, and two that join the bytes. That is 21 integer instructions for eight weights
and touches no memory. float32 values come from a table spread over the lanes of a warp, one shuffle
each, which takes the index from the low bits of a word; in the interpreter from a table in memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from qcompiler.kernels.formats.lut4 import NESTED_BLOCK, table

NESTED: tl.constexpr = tl.constexpr(NESTED_BLOCK)


@cache
def decode_asm(quant_type: str, dtype: torch.dtype) -> str:
    """PTX for one int32 word ($4) of eight codes → four words ($0-$3) of two table values each, in K order.

    The high nibble of a byte is the even element, so the bytes that PRMT picks by the nibbles of the
    word stand as (1, 0, 3, 2); the last PRMT of a pair puts them right.
    """
    bits = [int(value) & 0xFFFF for value in table(quant_type).to(dtype).view(torch.int16)]
    low, high = [value & 0xFF for value in bits], [value >> 8 for value in bits]

    def word(values: list[int], first: int) -> str:
        return f"0x{sum(byte << (8 * i) for i, byte in enumerate(values[first : first + 4])):08x}"

    def lookup(result: str, values: list[int]) -> list[str]:
        return [
            f"prmt.b32 a, {word(values, 0)}, {word(values, 4)}, s;",
            f"prmt.b32 b, {word(values, 8)}, {word(values, 12)}, s;",
            f"prmt.b32 {result}, a, b, t;",
        ]

    lines = [
        "{", ".reg .b32 s, t, a, b, lo, hi;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 t, $4, 1;",
        "and.b32 t, t, 0x44444444;",
        "or.b32 t, t, 0x32103210;",
    ]  # fmt: skip
    for half in range(2):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 t, t, 16;"]
        lines += lookup("lo", low) + lookup("hi", high)
        lines += [f"prmt.b32 ${2 * half}, lo, hi, 0x4051;", f"prmt.b32 ${2 * half + 1}, lo, hi, 0x6273;"]
    return "\n".join([*lines, "}"])


_SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)
# $8: a word of eight codes, $9: address of the 16 float32 values; $0-$7: the values of the codes in K order.
SHUFFLE_ASM: tl.constexpr = tl.constexpr(
    "\n".join(
        [
            "{", ".reg .b32 n, t, i; .reg .b64 p;",
            "mov.u32 n, %laneid; and.b32 n, n, 15; mad.wide.u32 p, n, 4, $9; ld.global.nc.b32 t, [p];",
            *(
                f"shr.u32 i, $8, {shift}; shfl.sync.idx.b32 ${e}, t, i, 0x100f, 0xffffffff;"
                for e, shift in enumerate(_SHIFTS)
            ),
            "}",
        ]
    )
)  # fmt: skip


@triton.jit
def word_values(values, words, COMPILED: tl.constexpr):
    """float32 table values of the eight codes of each word, in K order."""
    if COMPILED:
        # Not pure: a shuffle must stay where all lanes of the warp run it.
        return tl.inline_asm_elementwise(
            SHUFFLE_ASM, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,l", [words, values.to(tl.int64)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32,
                   tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return (
            code_value(values, words, 0), code_value(values, words, 1), code_value(values, words, 2),
            code_value(values, words, 3), code_value(values, words, 4), code_value(values, words, 5),
            code_value(values, words, 6), code_value(values, words, 7),
        )  # fmt: skip


@triton.jit
def part_of_rows(
    row, part_rows, nested_offset, K, BLOCK: tl.constexpr, PARTS: tl.constexpr, DOUBLE: tl.constexpr
):
    """Row within its part, the part's first block and first nested block, and its offset, for each row.

    Weights laid side by side keep their own blocks.
    """
    local = row
    first_block = row * 0
    first_nested = row * 0
    offset = row.to(tl.float32) * 0.0
    start = 0
    blocks = 0
    nested = 0
    for part in tl.static_range(PARTS):
        rows = tl.load(part_rows + part)
        inside = (row >= start) & (row < start + rows)
        local = tl.where(inside, row - start, local)
        first_block = tl.where(inside, blocks, first_block)
        first_nested = tl.where(inside, nested, first_nested)
        if DOUBLE:
            offset = tl.where(inside, tl.load(nested_offset + part), offset)
        count = ((rows.to(tl.int64) * K + (BLOCK - 1)) // BLOCK).to(tl.int32)
        start += rows
        blocks += count
        nested += (count + (NESTED - 1)) // NESTED
    return local, first_block, first_nested, offset


@triton.jit
def load_absmax(
    absmax,
    nested_absmax,
    steps,
    local,
    first_block,
    first_nested,
    offset,
    k,
    K,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """float32 absmax of the blocks that hold the elements (row, k); all arguments broadcast together.

    CROSS: blocks run across the ends of rows. `steps` is the dynamic map.
    """
    if CROSS:
        block = ((local.to(tl.int64) * K + k) // BLOCK).to(tl.int32)
    else:
        block = local * (K // BLOCK) + k // BLOCK
    if DOUBLE:
        code = tl.load(absmax + (first_block + block)).to(tl.int32)
        scale = tl.load(nested_absmax + (first_nested + block // NESTED))
        return tl.load(steps + code) * scale + offset
    else:
        return tl.load(absmax + (first_block + block))


@triton.jit
def unit_scales(
    absmax,
    nested_absmax,
    steps,
    local,
    first_block,
    first_nested,
    offset,
    unit,
    first_unit,
    K,
    BN: tl.constexpr,
    UNITS: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """float32 absmax [BN, UNITS] of units of PER codes; a unit never lies in two blocks.

    `unit` [UNITS] are clamped unit numbers from `first_unit` on. Where blocks do not cross rows each
    absmax is loaded once for its run of units.
    """
    ROW: tl.constexpr = BLOCK // PER
    RUN: tl.constexpr = ROW if ROW < UNITS else UNITS
    if CROSS:
        return load_absmax(
            absmax, nested_absmax, steps, local[:, None], first_block[:, None], first_nested[:, None],
            offset[:, None], (unit * PER)[None, :], K, BLOCK, CROSS, DOUBLE,
        )  # fmt: skip
    else:
        k = tl.minimum((first_unit + RUN * tl.arange(0, UNITS // RUN)) * PER, K - PER)
        scales = load_absmax(
            absmax, nested_absmax, steps, local[:, None], first_block[:, None], first_nested[:, None],
            offset[:, None], k[None, :], K, BLOCK, CROSS, DOUBLE,
        )  # fmt: skip
        return tl.reshape(tl.broadcast_to(scales[:, :, None], (BN, UNITS // RUN, RUN)), (BN, UNITS))


@triton.jit
def code_value(values, units, e: tl.constexpr):
    """float32 table value of code e of each unit (int32, lowest byte first, even code in the high nibble)."""
    SHIFT: tl.constexpr = 8 * (e // 2) + (4 if e % 2 == 0 else 0)
    return tl.load(values + ((units >> SHIFT) & 15))


@triton.jit
def interleave(even, odd):
    """[rows, n] and [rows, n] to [rows, 2n] with the columns taken in turn."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def scaled_pair(pair, scale, HALF: tl.constexpr):
    """Two half values in an int32 times a float32 scale, both rounded to HALF: [rows, 2n] from [rows, n]."""
    bits = scale.to(HALF).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if tl.bfloat16 == HALF:
        # A product as an fma with -0.0: bf16x2 products are younger than fmas.
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r",
            [pair, bits | (bits << 16)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        pair = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, bits | (bits << 16)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    even = (pair & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
    odd = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    return interleave(even, odd)
