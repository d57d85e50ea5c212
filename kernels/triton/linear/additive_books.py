"""Additive linears with small codebooks and 8 inputs per group: codebooks in shared memory, tensor cores.

A codeword is 16 bytes. In shared memory every codeword of an 8-bit codebook
stands eight times side by side, a copy for each of the lanes that are served
at once, so that random codes meet no bank conflict. What the lanes load is what
a tensor core instruction takes: the weight is never formed elsewhere, and one
look-up serves all tokens. Inputs are taken in the order in which a thread can
read the codes of several groups in one load; sums are float32.

Written in Gluon, because plain Triton can keep no table in shared memory
across a loop. The address of the only allocation is that of the symbol
`global_smem`; `check_alone` makes sure that there is no other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qcompiler.kernels.formats.additive import num_groups
from qcompiler.kernels.triton.launch import cdiv, on_device
from qcompiler.kernels.triton.linear.launch import split_target, sum_split
from qcompiler.kernels.triton.linear.shared_table import check_alone, table_bytes
from qcompiler.kernels.tuning.tables import LinearConfig, token_bucket

MAX_TOKENS = 64
# (bits, codebooks) whose tables fit a multiprocessor of Hopper.
_SCHEMES = ((8, 1), (8, 2), (8, 3), (8, 4), (12, 1), (12, 2))
_RESIDENT = 3 * 72 << 10  # bytes of its shared memory that tables may take


@gluon.jit
def _pair(word, HALF: gl.constexpr):
    """Both halves of an int32 as HALF, in a new last dimension."""
    lower = (word & 0xFFFF).to(gl.int16).to(HALF, bitcast=True)
    upper = (word >> 16).to(gl.int16).to(HALF, bitcast=True)
    return gl.join(lower, upper)


@gluon.jit
def _codewords(code, table, COPIES: gl.constexpr, HALF: gl.constexpr, W: gl.constexpr):
    """Codewords HALF [BN, BG·8], in layout W, of the codes [BN, BG]; at `table` the lane's copies begin."""
    a, b, c, d = gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [code.to(gl.int32) * (16 * COPIES) + table],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    evens = gl.join(_pair(a, HALF), _pair(c, HALF))  # [BN, BG, half, word // 2]
    odds = gl.join(_pair(b, HALF), _pair(d, HALF))
    words = gl.permute(gl.join(evens, odds), [0, 1, 3, 4, 2])
    words = gl.reshape(words, [code.shape[0], code.shape[1] * 8])
    return gl.convert_layout(words, W, assert_trivial=True)


@gluon.jit
def _in_turn(codes, BN: gl.constexpr, BG: gl.constexpr, COUNT: gl.constexpr):
    """Codes [BN, BG·COUNT] as they lie, to [BN, BG, COUNT] in the order of `linear_additive_books`."""
    runs = gl.reshape(codes, [BN, 4, BG // 4, COUNT])
    return gl.reshape(gl.permute(runs, [0, 2, 1, 3]), [BN, BG, COUNT])


@gluon.jit
def _code_at(w0, w1, w2, BIT: gl.constexpr, BITS: gl.constexpr):
    """The code that starts at bit BIT of three words."""
    SHIFT: gl.constexpr = BIT % 32
    low = w0 if BIT < 32 else (w1 if BIT < 64 else w2)
    code = low >> SHIFT
    if SHIFT + BITS > 32:
        high = w1 if BIT < 32 else w2
        code = (code & ((1 << (32 - SHIFT)) - 1)) | (high << (32 - SHIFT))
    return code & ((1 << BITS) - 1)


@gluon.jit
def _book_of_words(
    words, m: gl.constexpr, BN: gl.constexpr, BG: gl.constexpr, BITS: gl.constexpr, COUNT: gl.constexpr
):
    """Codes [BN, BG] of book m, in turn; of each four int32 of words [BN, 16] three hold BG/4 groups."""
    evens, odds = gl.split(gl.reshape(words, [BN, 4, 2, 2]))
    w0, w2 = gl.split(evens)
    w1, _ = gl.split(odds)
    NEXT: gl.constexpr = BITS * COUNT
    FIRST: gl.constexpr = BITS * m
    c0 = _code_at(w0, w1, w2, FIRST, BITS)
    c1 = _code_at(w0, w1, w2, FIRST + NEXT, BITS)
    c2 = _code_at(w0, w1, w2, FIRST + 2 * NEXT, BITS)
    c3 = _code_at(w0, w1, w2, FIRST + 3 * NEXT, BITS)
    if BG == 16:
        codes = gl.join(gl.join(c0, c2), gl.join(c1, c3))
    else:
        c4 = _code_at(w0, w1, w2, FIRST + 4 * NEXT, BITS)
        c5 = _code_at(w0, w1, w2, FIRST + 5 * NEXT, BITS)
        c6 = _code_at(w0, w1, w2, FIRST + 6 * NEXT, BITS)
        c7 = _code_at(w0, w1, w2, FIRST + 7 * NEXT, BITS)
        evens4 = gl.join(gl.join(c0, c4), gl.join(c2, c6))
        odds4 = gl.join(gl.join(c1, c5), gl.join(c3, c7))
        codes = gl.join(evens4, odds4)
    return gl.reshape(_in_turn(gl.reshape(codes, [BN, BG]), BN, BG, 1), [BN, BG])


@gluon.jit
def linear_additive_books(
    x,
    codes,
    codebooks,
    scales,
    bias,
    out,
    M,
    N,
    K,
    G,
    columns,
    x_stride,
    tiles_per_split,
    BITS: gl.constexpr,
    COUNT: gl.constexpr,
    COPIES: gl.constexpr,
    BN: gl.constexpr,
    BG: gl.constexpr,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    TAIL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PRODUCT: gl.constexpr,
    CODES: gl.constexpr,
    FILL: gl.constexpr,
):
    """Grid (cdiv(N, BN), splits): out [M, N] in x's dtype, or float32 parts [splits, M, N].

    x [M, K] float16 or bfloat16, rows x_stride apart; M at most BM. codes uint8 [N, columns]; where a run of
    R groups takes 12 bytes, int32. TAIL: 0 where K is a multiple of 8·BG, 1 where of 8, else 2.
    PRODUCT, CODES and FILL are the layouts that `book_layouts` gives.

    The groups of a tile are taken in the order 0, R, 2R, 3R, 1, R + 1, … with R = BG/4.
    """
    W: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 8)
    X: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 8)
    HALF: gl.constexpr = x.dtype.element_ty
    BK: gl.constexpr = BG * 8
    RUN: gl.constexpr = BG // 4
    WORDS: gl.constexpr = codes.dtype.element_ty == gl.int32
    VALUES: gl.constexpr = (8 << BITS) * COPIES  # of one codebook's table

    split = gl.program_id(1)
    first_row = gl.program_id(0) * BN
    # Rows past the end read the last one and are not stored.
    row = gl.minimum(first_row + gl.arange(0, BN, layout=gl.SliceLayout(1, CODES)), N - 1)
    first = split * tiles_per_split
    last = gl.minimum(first + tiles_per_split, gl.cdiv(G, BG))
    # Codes of a tile: bytes, or words, of which a thread has three (and the last twice).
    WIDTH: gl.constexpr = 12 if WORDS else BG * COUNT
    if WORDS:
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, CODES))
        column = first * WIDTH + column // 4 * 3 + gl.minimum(column % 4, 2)
    else:
        column = first * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, CODES))
    code_at = codes + row.to(gl.int64)[:, None] * columns + column[None, :]
    k = gl.arange(0, BK, layout=gl.SliceLayout(1, X))
    group = first * BG + (k // 8) % 4 * RUN + k // 32
    token = gl.arange(0, BM, layout=gl.SliceLayout(0, X))
    x_at = x + token.to(gl.int64)[None, :] * x_stride + (group * 8 + k % 8)[:, None]
    inside = (token < M)[None, :]

    # The first codes are on their way while the table is filled.
    following = gl.load(code_at, mask=(column < columns)[None, :], other=0)
    shared = gl.allocate_shared_memory(HALF, [COUNT, VALUES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    at = gl.arange(0, VALUES, layout=FILL)
    for m in gl.static_range(COUNT):
        values = gl.load(codebooks + m * (8 << BITS) + at // (8 * COPIES) * 8 + at % 8)
        shared.index(m).store(values.to(HALF))
    gl.thread_barrier()
    # Not pure, so that neither it nor the loads that depend on it can move above the barrier.
    table = gl.inline_asm_elementwise(
        "{ .reg .b32 lane; mov.u32 lane, %laneid; and.b32 lane, lane, $1; shl.b32 lane, lane, 4; "
        "mov.u32 $0, global_smem; add.u32 $0, $0, lane; }",
        "=r,r",
        [gl.to_tensor(COPIES - 1)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )

    acc = gl.zeros([BN, BM], gl.float32, layout=PRODUCT)
    for tile in range(first, last):
        code = following
        code_at += WIDTH
        column += WIDTH
        ahead = (column < columns) & (tile + 1 < last)
        following = gl.load(code_at, mask=ahead[None, :], other=0)
        if TAIL == 0:
            xt = gl.load(x_at, mask=inside, other=0.0)
        elif TAIL == 1:
            xt = gl.load(x_at, mask=inside & (group < G)[:, None], other=0.0)
        else:
            xt = gl.load(x_at, mask=inside & (group * 8 + k % 8 < K)[:, None], other=0.0)
        x_at += BK
        group += BG
        if WORDS:
            for m in gl.static_range(COUNT):
                book = _book_of_words(code, m, BN, BG, BITS, COUNT)
                acc = mma_v2(_codewords(book, table + m * 2 * VALUES, COPIES, HALF, W), xt, acc)
        elif COUNT == 1:
            book = gl.reshape(_in_turn(code, BN, BG, 1), [BN, BG])
            acc = mma_v2(_codewords(book, table, COPIES, HALF, W), xt, acc)
        elif COUNT == 2:
            book0, book1 = gl.split(_in_turn(code, BN, BG, 2))
            acc = mma_v2(_codewords(book0, table, COPIES, HALF, W), xt, acc)
            acc = mma_v2(_codewords(book1, table + 2 * VALUES, COPIES, HALF, W), xt, acc)
        else:
            evens, odds = gl.split(gl.reshape(_in_turn(code, BN, BG, 4), [BN, BG, 2, 2]))
            book0, book2 = gl.split(evens)
            book1, book3 = gl.split(odds)
            acc = mma_v2(_codewords(book0, table, COPIES, HALF, W), xt, acc)
            acc = mma_v2(_codewords(book1, table + 2 * VALUES, COPIES, HALF, W), xt, acc)
            acc = mma_v2(_codewords(book2, table + 4 * VALUES, COPIES, HALF, W), xt, acc)
            acc = mma_v2(_codewords(book3, table + 6 * VALUES, COPIES, HALF, W), xt, acc)

    rn = first_row + gl.arange(0, BN, layout=gl.SliceLayout(1, PRODUCT))
    rm = gl.arange(0, BM, layout=gl.SliceLayout(0, PRODUCT))
    row_out = gl.minimum(rn, N - 1)
    acc *= gl.load(scales + row_out).to(gl.float32)[:, None]
    if HAS_BIAS:
        acc += gl.load(bias + row_out).to(gl.float32)[:, None]
    at_out = (split * M + rm).to(gl.int64)[None, :] * N + rn[:, None]
    gl.store(out + at_out, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))
    shared._keep_alive()


@cache
def book_layouts(block_n: int, block_g: int, bits: int, count: int, warps: int) -> dict[str, Any]:
    """PRODUCT: rows over the warps; CODES: a row's codes by four threads; FILL: 8 values each."""
    run = 4 if in_words(bits, count) else block_g // 4 * count
    registers = [[0, 1 << i] for i in range(run.bit_length() - 1)] + [[8, 0]]
    registers += [[16 * warps << i, 0] for i in range((block_n // (16 * warps)).bit_length() - 1)]
    return {
        "PRODUCT": gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8]),
        "CODES": gl.DistributedLinearLayout(
            reg_bases=registers,
            lane_bases=[[0, run], [0, 2 * run], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16 << i, 0] for i in range(warps.bit_length() - 1)],
            block_bases=[],
            shape=[block_n, 4 * run],
        ),
        "FILL": gl.BlockedLayout([8], [32], [warps], [0]),
    }


def in_words(bits: int, count: int) -> bool:
    """Whether the kernel takes codes by words: 12 bytes hold a whole number of groups, 16 do not."""
    return bits == 12 or count == 3


def copies(bits: int) -> int:
    """Of each codeword: one for each of the eight lanes that are served 16 bytes at once, or one."""
    return 8 if bits == 8 else 1


def table_size(bits: int, count: int) -> int:
    """Bytes of shared memory that the codebooks take."""
    return count * copies(bits) * (16 << bits)


def groups_of_tile(bits: int, count: int, block_m: int) -> int:
    """Groups of a tile: as many as a thread's load holds; with many tokens the registers hold fewer."""
    if in_words(bits, count):
        return 384 // (bits * count)
    return 16 if count == 4 or block_m > 8 else 32


def books_fit(x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor) -> bool:
    """Whether `run_books` can compute x [tokens, in_features] with codebooks [sets, M, 2^bits, d]."""
    sets, count, codewords, group_size = codebooks.shape
    bits = codewords.bit_length() - 1
    return (
        (bits, count) in _SCHEMES
        and group_size == 8
        and sets == 1
        and (not in_words(bits, count) or codes.shape[1] % 4 == 0)
        and x.shape[0] <= MAX_TOKENS
        and x.element_size() == 2
        and table_bytes(x.device) >= table_size(bits, count)
    )


def books_config(
    tokens: int, out_features: int, in_features: int, bits: int, count: int, sms: int
) -> LinearConfig:
    """A sane configuration: as many programs as tables fit a multiprocessor, but not more than three."""
    block_m = max(8, token_bucket(tokens))
    resident = max(1, min(3, _RESIDENT // table_size(bits, count)))
    block_n = 128
    warps = 4 if block_m <= 16 and resident == 3 else 8
    if resident == 1 and block_m == 8:
        block_n, warps = 256, 16
    blocks = cdiv(out_features, block_n)
    tiles = cdiv(in_features, 8 * groups_of_tile(bits, count, block_m))
    # Time in tiles, one more for a program's start. A multiprocessor that has fewer programs than fit waits.
    split = min(
        range(1, min(tiles, 64) + 1),
        key=lambda s: max(resident, cdiv(blocks * s, sms)) * (cdiv(tiles, s) + 1),
    )
    return LinearConfig("shared", block_n, block_m, split, warps, 1)


def run_books(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig,
) -> torch.Tensor:
    """The product [tokens, out_features] with x [tokens, in_features]; see `books_fit`."""
    tokens, in_features = x.shape
    out_features = codes.shape[0]
    count, bits = codebooks.shape[1], codebooks.shape[2].bit_length() - 1
    if in_words(bits, count):
        codes = codes.view(torch.int32)
    block_m = max(8, token_bucket(tokens))
    block_g = groups_of_tile(bits, count, block_m)
    groups = num_groups(8, in_features)
    tiles = cdiv(groups, block_g)
    per_split = cdiv(tiles, config.split_k)
    splits = cdiv(tiles, per_split)
    out, target = split_target(x, out_features, splits)
    tail = 2 if in_features % 8 else int(in_features % (8 * block_g) != 0)
    with on_device(x):
        made = linear_additive_books[(cdiv(out_features, config.block_n), splits)](
            x,
            codes,
            codebooks,
            scales,
            bias if bias is not None else scales,
            target,
            tokens,
            out_features,
            in_features,
            groups,
            codes.shape[1],
            x.stride(0),
            per_split,
            BITS=bits,
            COUNT=count,
            COPIES=copies(bits),
            BN=config.block_n,
            BG=block_g,
            BM=block_m,
            WARPS=config.num_warps,
            TAIL=tail,
            HAS_BIAS=bias is not None and splits == 1,
            num_warps=config.num_warps,
            **book_layouts(config.block_n, block_g, bits, count, config.num_warps),
        )
        check_alone(made, table_size(bits, count))
        return sum_split(target, bias, out)
