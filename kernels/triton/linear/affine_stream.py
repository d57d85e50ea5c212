"""Affine GEMM for Hopper in Gluon: yᵀ = W · xᵀ, copying, decoding and multiplying at the same time.

Two warps let the copy engine bring words, scales and x into rings of shared
memory, each filled buffer and each emptied one told by an mbarrier. One or
two warpgroups decode words in the registers from which wgmma takes its left
operand, one plane ahead of the product that is still running.

Programs are persistent and take equal runs of (tile, block of K), so that no
SM waits for others: a tile that one program does alone is written at once,
parts of a tile are float32 partial sums, added up in a fixed order later.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra import cuda

from qcompiler.kernels.triton.linear.affine_stream_codes import (
    deal_rows,
    order_rows,
    pairs_layout,
    result_layout,
    sides_layout,
    sides_of_block,
    weights_of_plane,
    words_layout,
)


@gluon.jit
def _run(tiles, blocks, unit):
    """First and last + 1 of this program's (tile, block) pairs, whole tiles where unit == blocks."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    shares = tiles * blocks // unit
    return program * shares // programs * unit, (program + 1) * shares // programs * unit


@gluon.jit
def _copy_words(descs, rings, bars, numbers, BITS: gl.constexpr, SIDES: gl.constexpr, BURST: gl.constexpr):
    """A copying warp: words and sides of every block of the program's run."""
    word_desc, high_desc, side_desc = descs
    word_ring, high_ring, side_ring = rings
    full, empty = bars
    tiles, tiles_m, blocks, unit = numbers
    BUFFERS: gl.constexpr = word_ring.shape[0]
    BN: gl.constexpr = word_ring.shape[1]
    WORDS: gl.constexpr = word_ring.shape[2]
    BYTES: gl.constexpr = BN * (WORDS * (6 if BITS == 3 else 4) + 4 * 4)
    begin, end = _run(tiles, blocks, unit)
    cuda.gdc_wait()
    for start in range(begin, end, BURST):
        # Neighbours in a row of W are asked for together once all their buffers are free.
        for i in gl.static_range(BURST):
            iw = start + i - begin
            mbarrier.wait(empty.index(iw % BUFFERS), (iw // BUFFERS & 1) ^ 1, pred=start + i < end)
        for i in gl.static_range(BURST):
            step = start + i
            wanted = step < end
            block = step % blocks
            row = step // blocks // tiles_m * BN
            slot = (step - begin) % BUFFERS
            ready = full.index(slot)
            mbarrier.expect(ready, BYTES, pred=wanted)
            word = block * WORDS
            tma.async_copy_global_to_shared(word_desc, [row, word], ready, word_ring.index(slot), pred=wanted)
            if BITS == 3:
                high = high_ring.index(slot)
                tma.async_copy_global_to_shared(high_desc, [row, word], ready, high, pred=wanted)
            # Four sides are the least that the engine copies: those of neighbouring blocks come along.
            side = block * SIDES // 4 * 4
            tma.async_copy_global_to_shared(side_desc, [row, side], ready, side_ring.index(slot), pred=wanted)


@gluon.jit
def _copy_x(x_desc, x_ring, bars, numbers, PLANES: gl.constexpr, XP: gl.constexpr):
    """The other copying warp: x of every plane, XP planes to a buffer."""
    full, empty = bars
    tiles, tiles_m, blocks, unit = numbers
    BUFFERS: gl.constexpr = x_ring.shape[0] // XP
    BM: gl.constexpr = x_ring.shape[1]
    WIDTH: gl.constexpr = x_ring.shape[2]
    begin, end = _run(tiles, blocks, unit)
    ix = begin * 0
    cuda.gdc_wait()
    for step in range(begin, end):
        token = step // blocks % tiles_m * BM
        for p in gl.static_range(PLANES // XP):
            slot = ix % BUFFERS
            mbarrier.wait(empty.index(slot), (ix // BUFFERS & 1) ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, XP * BM * WIDTH * 2)
            for q in gl.static_range(XP):
                k = (step % blocks * PLANES + p * XP + q) * WIDTH
                tma.async_copy_global_to_shared(x_desc, [token, k], ready, x_ring.index(slot * XP + q))
            ix += 1


@gluon.jit
def _multiply(
    pointers,
    sizes,
    rings,
    x_ring,
    bars,
    x_bars,
    numbers,
    BITS: gl.constexpr,
    SIDES: gl.constexpr,
    PLANES: gl.constexpr,
    XP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HALF: gl.constexpr,
):
    """The warpgroups that decode and multiply."""
    out, parts, bias = pointers
    M, N = sizes
    word_ring, high_ring, side_ring = rings
    full, empty = bars
    x_full, x_empty = x_bars
    tiles, tiles_m, blocks, unit = numbers
    BUFFERS: gl.constexpr = word_ring.shape[0]
    BN: gl.constexpr = word_ring.shape[1]
    WORDS: gl.constexpr = word_ring.shape[2]
    X_BUFFERS: gl.constexpr = x_ring.shape[0] // XP
    BM: gl.constexpr = x_ring.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BM, 16]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    LOADED: gl.constexpr = words_layout(BN, WORDS, WARPS)
    PAIRS: gl.constexpr = pairs_layout(BN, WORDS, WARPS)
    RESULT: gl.constexpr = result_layout(BN, BM, WARPS)
    # Twice the words beside so many sums are too much for the registers: every plane reads them again.
    AGAIN: gl.constexpr = BITS == 4 and BN > 16 * WARPS and BM > 32
    begin, end = _run(tiles, blocks, unit)
    step = begin
    ix = begin * 0
    while step < end:
        tile = step // blocks
        first = step % blocks
        last = gl.minimum(blocks, first + end - step)
        acc = gl.zeros([BN, BM], gl.float32, MMA)
        for block in range(first, last):
            iw = step - begin + block - first
            slot = iw % BUFFERS
            mbarrier.wait(full.index(slot), iw // BUFFERS & 1)
            words = deal_rows(word_ring.index(slot).load(LOADED), BN, WORDS)
            sides = side_ring.index(slot).load(sides_layout(BN, WARPS))
            upper = words
            if BITS == 3:
                upper = high_ring.index(slot).load(LOADED).to(gl.int32)
                upper = deal_rows((upper & 0x00FF) | ((upper & 0xFF00) << 8), BN, WORDS)
            if not AGAIN:
                mbarrier.arrive(empty.index(slot), count=1)
            words = gl.convert_layout(words, PAIRS, assert_trivial=True)
            upper = gl.convert_layout(upper, PAIRS, assert_trivial=True)
            of_block = sides_of_block(deal_rows(sides, BN, 4), block, BN, SIDES)
            for j in gl.static_range(PLANES):
                side = of_block[j * SIDES // PLANES]
                side = gl.convert_layout(side, gl.SliceLayout(1, PAIRS), assert_trivial=True)
                if AGAIN and j > 0:
                    words = deal_rows(word_ring.index(slot).load(LOADED), BN, WORDS)
                    words = gl.convert_layout(words, PAIRS, assert_trivial=True)
                    if j == PLANES - 1:
                        mbarrier.arrive(empty.index(slot), count=1)
                weight = weights_of_plane(words, upper, side, j, BITS, OPERAND, HALF)
                if j % XP == 0:
                    mbarrier.wait(x_full.index(ix % X_BUFFERS), ix // X_BUFFERS & 1)
                held = x_ring.index(ix % X_BUFFERS * XP + j % XP).permute((1, 0))
                sums = warpgroup_mma(weight, held, acc, is_async=True)
                # All products but the one just begun are done: the buffer before is free.
                acc = warpgroup_mma_wait(1, deps=(sums,))
                if j % XP == 0:
                    before = (ix + X_BUFFERS - 1) % X_BUFFERS
                    mbarrier.arrive(x_empty.index(before), count=1, pred=ix > 0)
                if j % XP == XP - 1:
                    ix += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        y = gl.convert_layout(order_rows(acc, BN, BM), RESULT, assert_trivial=True)
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
            part = 2 * gl.program_id(0) + (first == 0).to(gl.int32)
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
    BURST: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HALF: gl.constexpr,
):
    """Any number of programs; num_warps 4 or 8.

    2, 3 or 4 bits, blocks of 256 codes with SIDES groups. Boxes of the descriptors, WIDTH being the codes of
    a plane: x [M, K] (BM, WIDTH), words and high [N, words] (BN, WIDTH/2), high None but for 3 bits, sides
    [N, groups] (BN, 4); BN is 16 or 32 times the warps. unit = blocks for whole tiles, 1 to divide them.
    parts float32 [2·programs, BM, BN]. WS and XS buffers in the rings, XP planes of x per buffer; BURST
    blocks of words are asked for at a time, at most WS.
    """
    cuda.gdc_launch_dependents()
    WIDTH: gl.constexpr = x_desc.block_shape[1]
    word_ring = gl.allocate_shared_memory(gl.int32, [WS, BN, WIDTH // 2], word_desc.layout)
    high_ring = word_ring
    if BITS == 3:
        high_ring = gl.allocate_shared_memory(gl.int16, [WS, BN, WIDTH // 2], high_desc.layout)
    side_ring = gl.allocate_shared_memory(gl.int32, [WS, BN, 4], side_desc.layout)
    x_ring = gl.allocate_shared_memory(HALF, [XS * XP, BM, WIDTH], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [WS, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [XS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(XS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    rings = (word_ring, high_ring, side_ring)
    bars = (full, empty)
    x_bars = (x_full, x_empty)
    numbers = (tiles, tiles_m, blocks, unit)
    pointers = (out, parts, bias)
    descs = (word_desc, high_desc if BITS == 3 else word_desc, side_desc)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    pointers, (M, N), rings, x_ring, bars, x_bars, numbers,
                    BITS, SIDES, 256 // WIDTH, XP, HAS_BIAS, HALF,
                ),
            ),
            (_copy_words, (descs, rings, bars, numbers, BITS, SIDES, BURST)),
            (_copy_x, (x_desc, x_ring, x_bars, numbers, 256 // WIDTH, XP)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip
