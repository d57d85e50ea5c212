"""Additive linears with one codebook of 16 bits: the codebook as int8 in shared memory, tensor cores.

A codebook of 65536 codewords of 8 values fits no multiprocessor. Two of the 8
values of each, as int8, take 128 KB and do: a program keeps one such slice and
adds up what it contributes to its rows; the four slices' sums are added
afterwards. A look-up is then a load of two bytes from shared memory, where 32
random ones take 3.5 cycles, against one of 16 bytes from the second-level
cache. The two int8 become one register of a tensor core operand, so that one
look-up serves all tokens. Sums are float32.

Written in Gluon, because plain Triton can keep no table in shared memory
across a loop. The address of the only allocation is that of the symbol
`global_smem`; `check_alone` makes sure that there is no other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from qcompiler.kernels.triton.launch import cdiv, on_device
from qcompiler.kernels.triton.linear.launch import multiprocessors, sum_split
from qcompiler.kernels.triton.linear.shared_table import check_alone, table_bytes
from qcompiler.kernels.tuning.tables import LinearConfig, token_bucket

MAX_TOKENS = 32
_SLICE_BYTES = 2 * 65536
_GROUPS = 64  # of a tile


@triton.jit
def slice_inputs(x, out, M, K, G, x_stride, BK: tl.constexpr):
    """Grid (cdiv(8·G, BK), M): x [M, K] to [4, M, G, 2], inputs 2s and 2s + 1 of each group in slice s.

    Inputs past K are zero.
    """
    token = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    value = tl.load(x + token.to(tl.int64) * x_stride + k, mask=k < K, other=0.0)
    at = (k % 8 // 2 * M + token).to(tl.int64) * (2 * G) + k // 8 * 2 + k % 2
    tl.store(out + at, value, mask=k < 8 * G)


@gluon.jit
def _weights(code, table, HALF: gl.constexpr):
    """The two int8 of each code [BN, BG] as HALF [BN, 2·BG].

    A byte q becomes a float by its place in the mantissa of a power of two: (128 + low 7 bits) − (128, or
    256 where q is negative) in bfloat16, (1024 + q + 128) − 1152 in float16.
    """
    address = (code.to(gl.int32) & 0xFFFF) * 2 + table
    if HALF == gl.bfloat16:
        word = gl.inline_asm_elementwise(
            "{ .reg .b32 q, low, sign; ld.shared.u16 q, [$1]; prmt.b32 q, q, 0x43434343, 0x4140; "
            "and.b32 low, q, 0xff7fff7f; and.b32 sign, q, 0xff80ff80; sub.rn.bf16x2 $0, low, sign; }",
            "=r,r",
            [address],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        word = gl.inline_asm_elementwise(
            "{ .reg .b32 q, middle; ld.shared.u16 q, [$1]; prmt.b32 q, q, 0x64646464, 0x4140; "
            "xor.b32 q, q, 0x00800080; mov.b32 middle, 0x64806480; sub.rn.f16x2 $0, q, middle; }",
            "=r,r",
            [address],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    lower = (word & 0xFFFF).to(gl.int16).to(HALF, bitcast=True)
    upper = (word >> 16).to(gl.int16).to(HALF, bitcast=True)
    return gl.reshape(gl.join(lower, upper), [code.shape[0], 2 * code.shape[1]])


@gluon.jit
def linear_additive_slices(
    x,
    codes,
    tables,
    table_scale,
    scales,
    out,
    M,
    N,
    G,
    columns,
    splits,
    workers,
    BN: gl.constexpr,
    BG: gl.constexpr,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    PRODUCT: gl.constexpr,
    CODES: gl.constexpr,
    FILL: gl.constexpr,
):
    """Grid 4·workers: float32 parts [splits·4, M, N], whose sum is x · Wᵀ.

    x [4, M, G, 2] from `slice_inputs`, G a multiple of BG, M at most BM; tables int32 [4, 32768], the int8 of
    two neighbouring codewords in each; codes [N, columns], columns at most G. The workers of a slice take
    row blocks and `splits` parts of their columns in turn; programs of one worker's number read the same
    codes at about the same time. PRODUCT, CODES and FILL are the layouts that `slice_layouts` gives.
    """
    W: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 8)
    X: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 8)
    BK: gl.constexpr = BG * 2
    part = gl.program_id(0) % 4
    worker = gl.program_id(0) // 4

    shared = gl.allocate_shared_memory(gl.int32, [32768], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    source = tables + part * 32768 + gl.arange(0, 32768, layout=FILL)
    async_copy.async_copy_global_to_shared(shared, source)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.thread_barrier()
    # Not pure, so that neither it nor the loads that depend on it can move above the barrier.
    table = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; // $1", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )

    k = gl.arange(0, BK, layout=gl.SliceLayout(1, X))
    token = gl.arange(0, BM, layout=gl.SliceLayout(0, X))
    x_first = x + (part * M + token).to(gl.int64)[None, :] * (2 * G) + k[:, None]
    inside = (token < M)[None, :]
    lane_row = gl.arange(0, BN, layout=gl.SliceLayout(1, CODES))
    lane_column = gl.arange(0, BG, layout=gl.SliceLayout(0, CODES))
    scale = gl.load(table_scale)
    blocks = gl.cdiv(N, BN)
    tiles = G // BG
    per_split = gl.cdiv(tiles, splits)

    for item in range(worker, blocks * splits, workers):
        split = item // blocks
        first_row = item % blocks * BN
        # Rows past the end read the last one and are not stored.
        row = gl.minimum(first_row + lane_row, N - 1)
        first = split * per_split
        last = gl.minimum(first + per_split, tiles)
        column = first * BG + lane_column
        code_at = codes + row.to(gl.int64)[:, None] * columns + column[None, :]
        x_at = x_first + first * BK
        acc = gl.zeros([BN, BM], gl.float32, layout=PRODUCT)
        following = gl.load(code_at, mask=(column < columns)[None, :], other=0)
        for tile in range(first, last):
            code = following
            code_at += BG
            column += BG
            ahead = (column < columns) & (tile + 1 < last)
            following = gl.load(code_at, mask=ahead[None, :], other=0)
            xt = gl.load(x_at, mask=inside, other=0.0)
            x_at += BK
            weight = gl.convert_layout(_weights(code, table, x.dtype.element_ty), W, assert_trivial=True)
            acc = mma_v2(weight, xt, acc)
        rn = first_row + gl.arange(0, BN, layout=gl.SliceLayout(1, PRODUCT))
        rm = gl.arange(0, BM, layout=gl.SliceLayout(0, PRODUCT))
        acc *= (gl.load(scales + gl.minimum(rn, N - 1)).to(gl.float32) * scale)[:, None]
        at = ((split * 4 + part) * M + rm).to(gl.int64)[None, :] * N + rn[:, None]
        gl.store(out + at, acc, mask=(rn[:, None] < N) & (rm[None, :] < M))
    shared._keep_alive()


@cache
def slice_layouts(block_n: int, block_g: int, warps: int) -> dict[str, Any]:
    """PRODUCT: rows over the warps; CODES: four neighbours a thread; FILL: 16 bytes of the table each."""
    registers = [[0, 1], [0, 2], [8, 0]]
    registers += [[0, 16 << i] for i in range((block_g // 16).bit_length() - 1)]
    registers += [[16 * warps << i, 0] for i in range((block_n // (16 * warps)).bit_length() - 1)]
    return {
        "PRODUCT": gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8]),
        "CODES": gl.DistributedLinearLayout(
            reg_bases=registers,
            lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16 << i, 0] for i in range(warps.bit_length() - 1)],
            block_bases=[],
            shape=[block_n, block_g],
        ),
        "FILL": gl.BlockedLayout([4], [32], [warps], [0]),
    }


def slices_fit(x: torch.Tensor) -> bool:
    """Whether `run_slices` can compute x [tokens, in_features] on this GPU."""
    return x.shape[0] <= MAX_TOKENS and x.element_size() == 2 and table_bytes(x.device) >= _SLICE_BYTES


@cache
def slices_config(tokens: int, out_features: int, in_features: int, sms: int) -> LinearConfig:
    """A sane configuration: the workers of a slice end at about the same time."""
    block_m = max(8, token_bucket(tokens))
    block_n, warps = (256, 16) if block_m <= 16 else (128, 8)
    workers = max(1, sms // 4)
    blocks, tiles = cdiv(out_features, block_n), cdiv(in_features, 8 * _GROUPS)
    # Time in tiles, one more for the start and end of a part.
    split = min(
        range(1, min(tiles, 8) + 1),
        key=lambda s: cdiv(blocks * s, workers) * (cdiv(tiles, s) + 1),
    )
    return LinearConfig("shared", block_n, block_m, split, warps, 1)


def run_slices(
    x: torch.Tensor,
    codes: torch.Tensor,
    tables: torch.Tensor,
    table_scale: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig,
) -> torch.Tensor:
    """The product [tokens, out_features] with x [tokens, in_features]; see `slices_fit`."""
    tokens, in_features = x.shape
    out_features, columns = codes.shape
    groups = cdiv(columns, _GROUPS) * _GROUPS
    workers = max(1, multiprocessors(x.device) // 4)
    sliced = x.new_empty((4, tokens, groups, 2))
    out = x.new_empty((tokens, out_features))
    parts = x.new_empty((4 * config.split_k, tokens, out_features), dtype=torch.float32)
    with on_device(x):
        slice_inputs[(cdiv(8 * groups, 1024), tokens)](
            x, sliced, tokens, in_features, groups, x.stride(0), BK=1024, num_warps=4
        )
        made = linear_additive_slices[(4 * workers,)](
            sliced,
            codes,
            tables.flatten().view(torch.int32),
            table_scale,
            scales,
            parts,
            tokens,
            out_features,
            groups,
            columns,
            config.split_k,
            workers,
            BN=config.block_n,
            BG=_GROUPS,
            BM=max(8, token_bucket(tokens)),
            WARPS=config.num_warps,
            num_warps=config.num_warps,
            **slice_layouts(config.block_n, _GROUPS, config.num_warps),
        )
        check_alone(made, _SLICE_BYTES)
        return sum_split(parts, bias, out)
