"""Affine GEMM for Hopper in Gluon: yᵀ = W · xᵀ, copying, decoding and multiplying at the same time.

One warp lets the copy engine bring words, scales and x into rings of shared
memory, each filled buffer and each emptied one told by an mbarrier. One or
two warpgroups decode 64 rows of words each in the registers from which wgmma
takes its left operand, one plane ahead of the product that is still running.

Programs are persistent and take equal runs of (tile, block of K), so that no
SM waits for others: a tile that one program does alone is written at once,
parts of a tile are float32 partial sums, which `sum_parts` adds up in a fixed
order. Rows of W are dealt to the rows of the product so that a thread holds
neighbouring output channels and writes them together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

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
def _deal_rows(t, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Row 16a + 2b + c of [ROWS, COLUMNS] becomes row 16a + 8c + b."""
    t = t.reshape([ROWS // 16, 8, 2, COLUMNS]).permute([0, 2, 1, 3])
    return t.reshape([ROWS, COLUMNS])


@gluon.jit
def _order_rows(t, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """`_deal_rows` undone."""
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


@gluon.constexpr_function
def _shift(bits, plane):
    """How far words are shifted for a plane; several 2- and 3-bit planes fit below a bf16's exponent."""
    return 4 * plane if bits == 4 else 6 * (plane // 3)


@gluon.constexpr_function
def _decode(bits, plane, half):
    """Assembly of (code - 2^(bits-1))·scale + offset for both codes of a plane in a (shifted) word.

    The codes stay at bit `at` of the two mantissas and count 2^at too much until the first fma, which is exact.
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
        # $4: upper bits, moved to where they belong
        lines.insert(4, f"lop3.b32 t, $4, {(4 << at) * 0x10001}, t, 0xEA;")
    return "{" + " ".join(lines) + "}"


@gluon.jit
def _pairs(word, upper, scale, offset, j: gl.constexpr, BITS: gl.constexpr, HALF: gl.constexpr):
    """Both codes of plane j as two halves of an int32."""
    ASM: gl.constexpr = _decode(BITS, j, "bf16" if HALF == gl.bfloat16 else "fp16")
    word = word >> _shift(BITS, j)
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
def _weights(words, upper, side, j: gl.constexpr, BITS: gl.constexpr, OPERAND: gl.constexpr, HALF: gl.constexpr):
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
def _sides_of_block(sides, block, ROWS: gl.constexpr, SIDES: gl.constexpr):
    """Four of [ROWS], or fewer where a block has fewer groups; sides [ROWS, 4] of the block and its neighbours."""
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


@gluon.jit
def _run(program, programs, tiles, blocks, unit):
    """First and last + 1 of a program's (tile, block) pairs, whole tiles where unit == blocks."""
    shares = tiles * blocks // unit
    return program * shares // programs * unit, (program + 1) * shares // programs * unit


@gluon.jit
def _copy_words(
    descs,
    rings,
    bars,
    numbers,
    BITS: gl.constexpr,
    SIDES: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    WS: gl.constexpr,
    XS: gl.constexpr,
    XP: gl.constexpr,
):
    """A copying warp: words and sides of every block of the program's run."""
    x_desc, word_desc, high_desc, side_desc = descs
    word_ring, high_ring, side_ring, x_ring = rings
    WORDS: gl.constexpr = word_ring.shape[2]
    PLANES: gl.constexpr = 8 if BITS < 4 else 4
    word_full, word_empty, x_full, x_empty = bars
    tiles, tiles_m, blocks, unit = numbers
    begin, end = _run(gl.program_id(0), gl.num_programs(0), tiles, blocks, unit)
    cuda.gdc_wait()
    for step in range(begin, end):
        block = step % blocks
        first = step // blocks // tiles_m * BN
        slot = (step - begin) % WS
        mbarrier.wait(word_empty.index(slot), ((step - begin) // WS & 1) ^ 1)
        full = word_full.index(slot)
        HIGH: gl.constexpr = BN * WORDS * 2 if BITS == 3 else 0
        mbarrier.expect(full, BN * WORDS * 4 + HIGH + BN * 4 * 4)
        tma.async_copy_global_to_shared(word_desc, [first, block * WORDS], full, word_ring.index(slot))
        if BITS == 3:
            tma.async_copy_global_to_shared(high_desc, [first, block * WORDS], full, high_ring.index(slot))
        side = block * SIDES // 4 * 4
        tma.async_copy_global_to_shared(side_desc, [first, side], full, side_ring.index(slot))


@gluon.jit
def _copy_x(
    descs,
    rings,
    bars,
    numbers,
    BITS: gl.constexpr,
    SIDES: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    WS: gl.constexpr,
    XS: gl.constexpr,
    XP: gl.constexpr,
):
    """The other copying warp: x of every plane, XP planes to a buffer."""
    x_desc, word_desc, high_desc, side_desc = descs
    word_ring, high_ring, side_ring, x_ring = rings
    WORDS: gl.constexpr = word_ring.shape[2]
    PLANES: gl.constexpr = 8 if BITS < 4 else 4
    word_full, word_empty, x_full, x_empty = bars
    tiles, tiles_m, blocks, unit = numbers
    begin, end = _run(gl.program_id(0), gl.num_programs(0), tiles, blocks, unit)
    ix = begin * 0
    cuda.gdc_wait()
    for step in range(begin, end):
        block = step % blocks
        first = step // blocks % tiles_m * BM
        for p in gl.static_range(PLANES // XP):
            slot = ix % XS
            mbarrier.wait(x_empty.index(slot), (ix // XS & 1) ^ 1)
            full = x_full.index(slot)
            mbarrier.expect(full, XP * BM * WORDS * 4)
            for q in gl.static_range(XP):
                k = (block * PLANES + p * XP + q) * 2 * WORDS
                tma.async_copy_global_to_shared(x_desc, [first, k], full, x_ring.index(slot * XP + q))
            ix += 1


@gluon.jit
def _multiply(
    pointers,
    rings,
    bars,
    numbers,
    sizes,
    BITS: gl.constexpr,
    SIDES: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    WS: gl.constexpr,
    XS: gl.constexpr,
    XP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HALF: gl.constexpr,
):
    """The warpgroups that decode and multiply."""
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RESULT: gl.constexpr = result_layout(BN, BM, WARPS)
    out, parts, bias = pointers
    word_ring, high_ring, side_ring, x_ring = rings
    WORDS: gl.constexpr = word_ring.shape[2]
    PLANES: gl.constexpr = 8 if BITS < 4 else 4
    PAIRS: gl.constexpr = pairs_layout(BN, WORDS, WARPS)
    word_full, word_empty, x_full, x_empty = bars
    tiles, tiles_m, blocks, unit = numbers
    M, N = sizes
    program = gl.program_id(0)
    begin, end = _run(program, gl.num_programs(0), tiles, blocks, unit)
    step = begin
    ix = begin * 0
    while step < end:
        tile = step // blocks
        first = step % blocks
        last = gl.minimum(blocks, first + end - step)
        acc = gl.zeros([BN, BM], gl.float32, MMA)
        for block in range(first, last):
            iw = step - begin + block - first
            slot = iw % WS
            mbarrier.wait(word_full.index(slot), iw // WS & 1)
            words = word_ring.index(slot).load(words_layout(BN, WORDS, WARPS))
            sides = side_ring.index(slot).load(sides_layout(BN, WARPS))
            upper = words
            if BITS == 3:
                upper = high_ring.index(slot).load(words_layout(BN, WORDS, WARPS)).to(gl.int32)
                upper = (upper & 0x00FF) | ((upper & 0xFF00) << 8)
            mbarrier.arrive(word_empty.index(slot), count=1)
            words = gl.convert_layout(_deal_rows(words, BN, WORDS), PAIRS, assert_trivial=True)
            upper = gl.convert_layout(_deal_rows(upper, BN, WORDS), PAIRS, assert_trivial=True)
            of_block = _sides_of_block(_deal_rows(sides, BN, 4), block, BN, SIDES)
            for j in gl.static_range(PLANES):
                side = of_block[j * SIDES // PLANES]
                side = gl.convert_layout(side, gl.SliceLayout(1, PAIRS), assert_trivial=True)
                weight = _weights(words, upper, side, j, BITS, OPERAND, HALF)
                if j % XP == 0:
                    mbarrier.wait(x_full.index(ix % XS), ix // XS & 1)
                held = x_ring.index(ix % XS * XP + j % XP).permute((1, 0))
                sums = warpgroup_mma(weight, held, acc, is_async=True)
                # All but the product just begun are done: the buffer before is free.
                acc = warpgroup_mma_wait(1, deps=(sums,))
                if j % XP == 0:
                    mbarrier.arrive(x_empty.index((ix + XS - 1) % XS), count=1, pred=ix > 0)
                if j % XP == XP - 1:
                    ix += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        y = gl.convert_layout(_order_rows(acc, BN, BM), RESULT, assert_trivial=True)
        row = gl.arange(0, BN, gl.SliceLayout(1, RESULT))
        column = gl.arange(0, BM, gl.SliceLayout(0, RESULT))
        if (first == 0) & (last == blocks):
            n = tile // tiles_m * BN + row
            m = tile % tiles_m * BM + column
            if HAS_BIAS:
                y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
            at = m.to(gl.int64)[None, :] * N + n[:, None]
            gl.store(out + at, y.to(out.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))
        else:
            # A program has at most two parts of tiles: the end of one at its start, the start of another.
            part = 2 * program + (first == 0).to(gl.int32)
            gl.store(parts + part * (BN * BM) + column[None, :] * BN + row[:, None], y)
        step += last - first


@gluon.jit(do_not_specialize=["M", "tiles_m", "tiles", "blocks", "unit"])
def linear_affine_stream(
    x_desc,
    word_desc,
    high_desc,
    side_desc,
    out,
    parts,
    bias,
    M,
    N,
    tiles_m,
    tiles,
    blocks,
    unit,
    BITS: gl.constexpr,
    SIDES: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    WS: gl.constexpr,
    XS: gl.constexpr,
    XP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Any number of programs; num_warps 4 or 8.

    Boxes of the descriptors: x [M, K] (BM, 64), words [N, words] (BN, 32), sides [N, groups] (BN, 4), BN 16
    or 32 times the warps. `blocks` of 256 codes per row; unit = blocks for whole tiles, 1 to divide them.
    parts float32 [2·programs, BM, BN]. WS and XS buffers in the rings, XP planes of x per buffer.
    """
    cuda.gdc_launch_dependents()
    WORDS: gl.constexpr = word_desc.block_shape[1]
    word_ring = gl.allocate_shared_memory(gl.int32, [WS, BN, WORDS], word_desc.layout)
    high_ring = word_ring
    if BITS == 3:
        high_ring = gl.allocate_shared_memory(gl.int16, [WS, BN, WORDS], high_desc.layout)
    side_ring = gl.allocate_shared_memory(gl.int32, [WS, BN, 4], side_desc.layout)
    x_ring = gl.allocate_shared_memory(HALF, [XS * XP, BM, 2 * WORDS], x_desc.layout)
    word_full = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    word_empty = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WS):
        mbarrier.init(word_full.index(i), count=1)
        mbarrier.init(word_empty.index(i), count=1)
    for i in gl.static_range(XS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    rings = (word_ring, high_ring, side_ring, x_ring)
    bars = (word_full, word_empty, x_full, x_empty)
    numbers = (tiles, tiles_m, blocks, unit)
    pointers = (out, parts, bias)
    sizes = (M, N)
    descs = (x_desc, word_desc, high_desc, side_desc)
    gl.warp_specialize(
        [
            (_multiply, (pointers, rings, bars, numbers, sizes, BITS, SIDES, BN, BM, WS, XS, XP, HAS_BIAS, HALF)),
            (_copy_words, (descs, rings, bars, numbers, BITS, SIDES, BN, BM, WS, XS, XP)),
            (_copy_x, (descs, rings, bars, numbers, BITS, SIDES, BN, BM, WS, XS, XP)),
        ],
        [1, 1],
        [24, 24],
    )


@triton.jit
def sum_parts(
    parts,
    out,
    bias,
    M,
    N,
    tiles_m,
    tiles,
    blocks,
    programs,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles, BM / BLOCK_M): the tiles of `linear_affine_stream` that more than one program worked on."""
    tile = tl.program_id(0)
    steps = tiles * blocks
    owner = ((tile * blocks + 1) * programs - 1) // steps
    final = ((tile + 1) * blocks * programs - 1) // steps
    if PDL:
        cuda.gdc_wait()
    if owner < final:
        n = tl.arange(0, BN)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        at = parts + m[:, None] * BN + n[None, :]
        y = tl.load(at + (2 * owner + 1) * (BN * BM))
        while owner < final:
            owner += 1
            y += tl.load(at + 2 * owner * (BN * BM))
        n += tile // tiles_m * BN
        m += tile % tiles_m * BM
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        mask = (m[:, None] < M) & (n[None, :] < N)
        tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=mask)
