"""Decoding of the affine format's words inside Triton kernels; the layout is told in `formats/affine.py`.

A code becomes a float without an int-to-float conversion: or-ed into the low
mantissa bits of a power of two, it reads as power + code (bf16 0x4300 is 128,
fp16 0x6400 is 1024, float32 0x4B000000 is 2^23), which one exact subtraction
turns into code − 2^(bits−1). The few lines of assembly are single
instructions that the compiler does not find by itself; COMPILED=False gives
the same values in plain Triton, for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.x_pairs import pair_floats


@triton.jit
def mask_or(word, kept, MASK: tl.constexpr, COMPILED: tl.constexpr):
    """(word & MASK) | kept; one LOP3, where two immediates would make the compiler emit two."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [word, tl.full(word.shape, MASK, tl.int32), kept],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (word & MASK) | kept


@triton.jit
def spread_high(high, BITS: tl.constexpr):
    """Move the upper bits of the odd codes from the upper half of a narrow word to bits 16 and up."""
    wide = high.to(tl.int32)
    if BITS == 5:
        return (wide | (wide << 12)) & 0x000F000F
    else:
        return (wide & 0x00FF) | ((wide & 0xFF00) << 8)


@triton.jit
def plane_bits(low, high, j: tl.constexpr, BITS: tl.constexpr, MAGIC: tl.constexpr, COMPILED: tl.constexpr):
    """Codes 2i and 2i+1 of plane j in the two halves of an int32, or-ed with MAGIC.

    `low` int32 words, `high` what `spread_high` gave (ignored where the bits have no upper part).
    """
    LOW: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 8 else 8)
    MASK: tl.constexpr = ((1 << LOW) - 1) * 0x00010001
    pair = mask_or(low >> (LOW * j), tl.full(low.shape, MAGIC, tl.int32), MASK, COMPILED)
    if BITS == 3 or BITS == 5 or BITS == 6:
        HIGH: tl.constexpr = BITS - LOW
        HIGH_MASK: tl.constexpr = (((1 << HIGH) - 1) << LOW) * 0x00010001
        SHIFT: tl.constexpr = HIGH * j - LOW
        if SHIFT >= 0:
            pair = mask_or(high >> SHIFT, pair, HIGH_MASK, COMPILED)
        else:
            pair = mask_or(high << (-SHIFT), pair, HIGH_MASK, COMPILED)
    return pair


@triton.jit
def plane_bits_at(low, high, j, BITS: tl.constexpr, MAGIC: tl.constexpr):
    """`plane_bits` of a plane whose number is known only when the kernel runs."""
    LOW: tl.constexpr = 2 if BITS < 4 else (4 if BITS < 8 else 8)
    pair = ((low >> (LOW * j)) & (((1 << LOW) - 1) * 0x00010001)) | MAGIC
    if BITS == 3 or BITS == 5 or BITS == 6:
        HIGH: tl.constexpr = BITS - LOW
        pair |= ((high >> (HIGH * j)) & (((1 << HIGH) - 1) * 0x00010001)) << LOW
    return pair


@triton.jit
def bytes_at(word, j):
    """`quad_bytes` of a plane whose number is known only when the kernel runs."""
    even = (((word >> (8 * j)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
    odd = (((word >> (8 * j + 16)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
    return even - 8388736.0, odd - 8388736.0


@triton.jit
def interleave(even, odd):
    """[rows, n] and [rows, n] to [rows, 2n] with the columns taken in turn; free where a thread has both."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _pair_of(value, HALF: tl.constexpr):
    """A float32 rounded to HALF, twice in an int32."""
    if HALF == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _fma_pair(a, b, c, HALF: tl.constexpr):
    """a·b + c on the two halves of int32s; in assembly because the compiler would split and re-pack them."""
    if HALF == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _halves(pair, HALF: tl.constexpr):
    """Both halves of int32 [rows, n] as HALF [rows, 2n]."""
    even = (pair & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
    odd = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    return interleave(even, odd)


@triton.jit
def _scaled_pairs(pair, scale, offset, BITS: tl.constexpr, HALF: tl.constexpr):
    """(code − 2^(BITS−1))·scale + offset as HALF [rows, 2·words]; codes carry their magic."""
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    # Bit patterns of 1 and −(base + centre), twice, as signed int32. Given in full shape: a
    # broadcast constant keeps the compiler from moving the layout conversion above this arithmetic.
    ONE: tl.constexpr = 0x3F803F80 if HALF == tl.bfloat16 else 0x3C003C00
    BASE: tl.constexpr = ((0xC300 if HALF == tl.bfloat16 else 0xE400) + CENTRE) * 0x00010001 - 2**32
    one = tl.full(pair.shape, ONE, tl.int32)
    pair = _fma_pair(pair, one, tl.full(pair.shape, BASE, tl.int32), HALF)
    return _halves(_fma_pair(pair, scale, offset, HALF), HALF)


@triton.jit
def _centred_floats(pair, BITS: tl.constexpr, HALF: tl.constexpr):
    """Both codes of a pair that carries its magic, minus 2^(BITS−1), as float32; for the interpreter."""
    BASE: tl.constexpr = (128.0 if HALF == tl.bfloat16 else 1024.0) + (1 << (BITS - 1))
    even, odd = pair_floats(pair, HALF)
    return even - BASE, odd - BASE


@triton.jit
def _byte_float(word, byte: tl.constexpr, COMPILED: tl.constexpr):
    """2^23 + one byte of the word, as float32."""
    magic = tl.full(word.shape, 0x4B000000, tl.int32)
    if COMPILED:
        if byte == 0:
            bits = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7650;", "=r,r,r", [word, magic], dtype=tl.int32, is_pure=True, pack=1
            )
        elif byte == 1:
            bits = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7651;", "=r,r,r", [word, magic], dtype=tl.int32, is_pure=True, pack=1
            )
        elif byte == 2:
            bits = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7652;", "=r,r,r", [word, magic], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            bits = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7653;", "=r,r,r", [word, magic], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        bits = ((word >> (8 * byte)) & 0xFF) | magic
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quad_bytes(word, j: tl.constexpr, COMPILED: tl.constexpr):
    """8-bit codes 2i and 2i+1 of plane j, minus 128, as float32."""
    return _byte_float(word, j, COMPILED) - 8388736.0, _byte_float(word, j + 2, COMPILED) - 8388736.0


@triton.jit
def dequantize_plane(
    low,
    high,
    scale,
    offset,
    j: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """(code − 2^(BITS−1))·scale + offset of plane j as [rows, 2·words].

    `scale` and `offset` are float32, [rows, 1] or [rows, words]: two neighbours
    never lie in different groups. HALF is tl.bfloat16 or tl.float16: the dtype
    of the result, whose mantissa takes the code. bf16 has no room for 8 bits,
    so those go through float32. Not COMPILED (in the interpreter, whose bf16 arithmetic is wrong) all
    arithmetic and the result are float32.
    """
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    if BITS == 8 and HALF == tl.bfloat16:
        even = _byte_float(low, j, COMPILED) - (8388608.0 + CENTRE)
        odd = _byte_float(low, j + 2, COMPILED) - (8388608.0 + CENTRE)
        weight = interleave(even * scale + offset, odd * scale + offset)
        if COMPILED:
            weight = weight.to(HALF)
        return weight
    else:
        MAGIC: tl.constexpr = 0x43004300 if HALF == tl.bfloat16 else 0x64006400
        pair = plane_bits(low, high, j, BITS, MAGIC, COMPILED)
        if COMPILED:
            return _scaled_pairs(pair, _pair_of(scale, HALF), _pair_of(offset, HALF), BITS, HALF)
        else:
            even, odd = _centred_floats(pair, BITS, HALF)
            return interleave(even * scale + offset, odd * scale + offset)


@triton.jit
def _lower_twice(side, COMPILED: tl.constexpr):
    """The lower half of an int32 in both halves."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0x1010;", "=r,r", [side], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (side & 0xFFFF) | (side << 16)


@triton.jit
def _upper_twice(side, COMPILED: tl.constexpr):
    """The upper half of an int32 in both halves."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0x3232;", "=r,r", [side], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return ((side >> 16) & 0xFFFF) | (side & -65536)


@triton.jit
def weights_of_pairs(pair, side, BITS: tl.constexpr, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """(code − 2^(BITS−1))·scale + offset as [rows, 2·words] of dtype HALF; float32 in the interpreter.

    `pair` as `plane_bits` gives it with HALF's magic; `side` int32 [rows, 1], scale and offset of dtype HALF.
    """
    if COMPILED:
        scale = tl.broadcast_to(_lower_twice(side, COMPILED), pair.shape)
        offset = tl.broadcast_to(_upper_twice(side, COMPILED), pair.shape)
        return _scaled_pairs(pair, scale, offset, BITS, HALF)
    else:
        even, odd = _centred_floats(pair, BITS, HALF)
        return weights_of_floats(even, odd, side, HALF, COMPILED)


@triton.jit
def weights_of_floats(even, odd, side, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """`weights_of_pairs` from codes that are float32 and centred already."""
    scale, offset = pair_floats(side, HALF)
    weight = interleave(even * scale + offset, odd * scale + offset)
    return weight.to(HALF) if COMPILED else weight


@triton.jit
def plane_floats(low, high, j: tl.constexpr, BITS: tl.constexpr, COMPILED: tl.constexpr):
    """Codes 2i and 2i+1 of plane j as two float32 tensors, each plus 128, or minus 128 for 8 bits.

    A bf16 pattern in the upper half of a register is the float32 of the same value.
    """
    if BITS == 8:
        return quad_bytes(low, j, COMPILED)
    else:
        pair = plane_bits(low, high, j, BITS, 0x43004300, COMPILED)
        even = (pair << 16).to(tl.float32, bitcast=True)
        odd = (pair & -65536).to(tl.float32, bitcast=True)
        return even, odd
