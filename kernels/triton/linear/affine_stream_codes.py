"""Decoding of the affine format's words in Gluon, in the layouts of wgmma's left operand.

Rows of W are dealt to the rows of the product so that a thread holds
neighbouring output channels. A code becomes a float as in
`affine_codes.py`; of the narrow ones several planes fit below the exponent
of one half, so that most need no shift.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _warp_rows(warps):
    """Bases of the warps: 16 rows each."""
    return [[16, 0], [32, 0], [64, 0]][: 2 if warps == 4 else 3]


@gluon.constexpr_function
def _more_rows(rows, warps):
    """Bases of the rows beyond 16 per warp, which the same threads have."""
    return [[16 * warps, 0]] if rows > 16 * warps else []


@gluon.constexpr_function
def _more_words(words):
    """Bases of the words of a row that the same thread has."""
    return [[0, 4], [0, 8], [0, 16]][: 2 if words == 16 else 3]


@gluon.constexpr_function
def words_layout(rows, words, warps):
    """Words of shared memory: a thread has rows 2i and 2i + 1, words q, q + 4, q + 8 and so on."""
    reg_bases = [[1, 0], *_more_words(words), *_more_rows(rows, warps)]
    lane_bases = [[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(reg_bases, lane_bases, _warp_rows(warps), [], [rows, words])


@gluon.constexpr_function
def sides_layout(rows, warps):
    """Sides [rows, 4], distributed by rows as the words are."""
    reg_bases = [[0, 1], [0, 2], [1, 0], *_more_rows(rows, warps)]
    lane_bases = [[0, 0], [0, 0], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(reg_bases, lane_bases, _warp_rows(warps), [], [rows, 4])


@gluon.constexpr_function
def pairs_layout(rows, words, warps):
    """Pairs of codes as wgmma's left operand has them, after rows were dealt out."""
    reg_bases = [[8, 0], *_more_words(words), *_more_rows(rows, warps)]
    lane_bases = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(reg_bases, lane_bases, _warp_rows(warps), [], [rows, words])


@gluon.constexpr_function
def result_layout(rows, columns, warps):
    """Sums [rows, columns] of wgmma after their rows were put in order again."""
    reg_bases = [[1, 0], [0, 1]]
    bit = 8
    while bit < columns:
        reg_bases.append([0, bit])
        bit *= 2
    reg_bases += _more_rows(rows, warps)
    lane_bases = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(reg_bases, lane_bases, _warp_rows(warps), [], [rows, columns])


@gluon.jit
def deal_rows(t, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Row 16a + 2b + c of [ROWS, COLUMNS] becomes row 16a + 8c + b."""
    t = t.reshape([ROWS // 16, 8, 2, COLUMNS]).permute([0, 2, 1, 3])
    return t.reshape([ROWS, COLUMNS])


@gluon.jit
def order_rows(t, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """`deal_rows` undone."""
    t = t.reshape([ROWS // 16, 2, 8, COLUMNS]).permute([0, 2, 1, 3])
    return t.reshape([ROWS, COLUMNS])


@gluon.jit
def _twice(side, UPPER: gl.constexpr):
    """One half of an int32 in both halves."""
    if UPPER:
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0x3232;", "=r,r", [side], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, 0x1010;", "=r,r", [side], dtype=gl.int32, is_pure=True, pack=1
        )


def plane_shift(bits: int, plane: int) -> int:
    """How far words are shifted for a plane; several 2- and 3-bit planes fit below a bf16's exponent."""
    return 4 * plane if bits == 4 else 6 * (plane // 3)


def decode_asm(bits: int, plane: int, half: str) -> str:
    """Assembly of (code - 2^(bits-1))·scale + offset for both codes of a plane in a (shifted) word.

    The codes stay at bit `at` of both mantissas and count 2^at too much until the first fma, which is
    exact. $1 is the shifted word, $2 and $3 scale and offset, $4 the upper bits of 3-bit codes in place.
    """
    at = 0 if bits == 4 else 2 * (plane % 3)
    mask = (3 if bits < 4 else 15) << at
    centre = 1 << (bits - 1)
    magic, exponent, mantissa = (0x4300, 127, 7) if half == "bf16" else (0x6400, 15, 10)
    one = (exponent - at) << mantissa
    base = (1 << mantissa >> at) + centre  # of magic once scaled, and the centre
    top = base.bit_length() - 1
    base = 0x8000 + (exponent + top << mantissa) + (base - (1 << top) << mantissa >> top)
    kind = "bf16x2" if half == "bf16" else "f16x2"
    lines = [
        ".reg .b32 t, one, base;",
        f"mov.b32 one, {one * 0x10001};",
        f"mov.b32 base, {base * 0x10001};",
        f"lop3.b32 t, $1, {mask * 0x10001}, {magic * 0x10001}, 0xEA;",
        f"fma.rn.{kind} t, t, one, base;",
        f"fma.rn.{kind} $0, t, $2, $3;",
    ]
    if bits == 3:
        lines.insert(4, f"lop3.b32 t, $4, {(4 << at) * 0x10001}, t, 0xEA;")
    return "{" + " ".join(lines) + "}"


_plane_shift = gluon.constexpr_function(plane_shift)
_decode_asm = gluon.constexpr_function(decode_asm)


@gluon.jit
def _pairs(word, upper, scale, offset, j: gl.constexpr, BITS: gl.constexpr, HALF: gl.constexpr):
    """Both codes of plane j as two halves of an int32."""
    ASM: gl.constexpr = _decode_asm(BITS, j, "bf16" if HALF == gl.bfloat16 else "fp16")
    word = word >> _plane_shift(BITS, j)
    if BITS == 3:
        # from bit j to bit 2 + 2·(j % 3)
        LEFT: gl.constexpr = 2 + 2 * (j % 3) - j
        upper = upper << LEFT if LEFT >= 0 else upper >> -LEFT
        return gl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r", [word, scale, offset, upper], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            ASM, "=r,r,r,r", [word, scale, offset], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def weights_of_plane(
    words, upper, side, j: gl.constexpr, BITS: gl.constexpr, OPERAND: gl.constexpr, HALF: gl.constexpr
):
    """Plane j of words [rows, words] as the left operand [rows, 2·words]; side [rows]."""
    scale = _twice(side, False).expand_dims(1)
    offset = _twice(side, True).expand_dims(1)
    scale, _ = gl.broadcast(scale, words)
    offset, _ = gl.broadcast(offset, words)
    pair = _pairs(words, upper, scale, offset, j, BITS, HALF)
    even = (pair & 0xFFFF).to(gl.int16).to(HALF, bitcast=True)
    odd = (pair >> 16).to(gl.int16).to(HALF, bitcast=True)
    both = gl.join(even, odd).reshape([words.shape[0], 2 * words.shape[1]])
    return gl.convert_layout(both, OPERAND, assert_trivial=True)


@gluon.jit
def sides_of_block(sides, block, ROWS: gl.constexpr, SIDES: gl.constexpr):
    """As many of [ROWS] as a block has groups; sides [ROWS, 4] of the block and its neighbours."""
    even, odd = gl.split(sides.reshape([ROWS, 2, 2]))
    side0, side2 = gl.split(even)
    side1, side3 = gl.split(odd)
    if SIDES == 4:
        return side0, side1, side2, side3
    elif SIDES == 2:
        return gl.where(block % 2 == 0, side0, side2), gl.where(block % 2 == 0, side1, side3)
    else:
        low = gl.where(block % 2 == 0, side0, side1)
        return (gl.where(block % 4 < 2, low, gl.where(block % 2 == 0, side2, side3)),)
