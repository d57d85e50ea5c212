"""Affine linears of all experts in one launch: rows sorted by expert, weights dequantized in registers.

A program owns a tile of one expert's rows (`expert_rows.py`) and a tile of its
output channels. The product stands as in `linear/affine_gemm.py`:
yᵀ [BN, BM] = W [BN, K] · xᵀ [K, BM], so that the dequantized operand is the one
that wgmma takes from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width, num_groups
from qcompiler.kernels.ops.grouped_linear_affine import check_grouped_linear_affine
from qcompiler.kernels.triton.grouped.expert_rows import (
    expert_tile,
    experts_power_of_2,
    rows_of_program,
    store_tile,
)
from qcompiler.kernels.triton.launch import cdiv, on_device
from qcompiler.kernels.triton.linear.affine_codes import dequantize_plane, spread_high


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_affine_kernel(
    x,
    low,
    high,
    scales,
    zeros,
    offsets,
    bias,
    out,
    rows,
    N,
    K,
    GROUPS,
    words,
    x_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (rows // BM + EXPERTS + 1, cdiv(N, BN)).

    x [rows, K] rows x_stride apart; stored tensors of [EXPERTS·N, K]; out [rows, N] in x's dtype. Not
    COMPILED, weights are float32 (the interpreter, or float32 x).
    """
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16  # a dot needs 16 columns of K
    BLOCK: tl.constexpr = PLANES * WIDTH
    TILE: tl.constexpr = PLANES * LANES
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    ONE_BLOCK: tl.constexpr = WIDTH == LANES

    expert, start_row, last = rows_of_program(offsets, rows, tl.program_id(0), EXPERTS, EXPERTS_P2, BM)
    is_expert = expert < EXPERTS
    if start_row >= last:
        return

    held = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = start_row + tl.arange(0, BM)
    # Channels past the end read the last one and are not stored, so that no load of the weight needs a mask.
    channel = tl.minimum(rn, N - 1)
    stored = EXPERTS * N
    lane = tl.arange(0, LANES)
    if ONE_BLOCK:
        position = lane
    else:
        position = (lane // WIDTH) * BLOCK + lane % WIDTH
    column = tl.arange(0, LANES // 2)
    # Where the two codes of a word begin, as `position` of the even one.
    pair_position = (2 * column // WIDTH) * BLOCK + 2 * column % WIDTH
    word_rows = (held * N + channel)[:, None] * words
    scales += held * N
    zeros += held * N
    x_rows = rm.to(tl.int64) * x_stride

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for tile in range(tl.where(is_expert, tl.cdiv(K, TILE), 0)):
        at = tile * (LANES // 2) + column
        if not ONE_BLOCK:
            at = tl.minimum(at, words - 1)
        word = tl.load(low + word_rows + at[None, :])
        upper = word
        if HAS_HIGH:
            upper = spread_high(tl.load(high + word_rows + at[None, :]), BITS)
        for j in tl.static_range(PLANES):
            k = tile * TILE + j * WIDTH + position
            x_mask = rm[None, :] < last
            if not EVEN_K:
                x_mask = x_mask & (k[:, None] < K)
            xt = tl.load(x + x_rows[None, :] + k[:, None], mask=x_mask, other=0.0)
            if not COMPILED:
                xt = xt.to(tl.float32)
            if ONE_BLOCK:
                group = tl.minimum((tile * TILE + j * WIDTH) // GROUP, GROUPS - 1) if GROUP else 0
                scale = tl.load(scales + group * stored + channel).to(tl.float32)[:, None]
                zero = tl.load(zeros + group * stored + channel).to(tl.float32)[:, None]
            else:
                first_k = tile * TILE + j * WIDTH + pair_position
                groups = tl.minimum(first_k // GROUP, GROUPS - 1) if GROUP else first_k * 0
                at_scale = groups[None, :] * stored + channel[:, None]
                scale = tl.load(scales + at_scale).to(tl.float32)
                zero = tl.load(zeros + at_scale).to(tl.float32)
            offset = (CENTRE - zero) * scale
            weight = dequantize_plane(word, upper, scale, offset, j, BITS, HALF, COMPILED)
            acc = tl.dot(weight, xt, acc, input_precision="ieee")

    store_tile(out, acc, bias, held, rn, rm, last, is_expert, N, HAS_BIAS)


COMPILED = not isinstance(grouped_linear_affine_kernel, InterpretedFunction)


def grouped_linear_affine_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::grouped_linear_affine`."""
    outputs = check_grouped_linear_affine(
        x, low, high, scales, zeros, offsets, bias, bits, group_size, in_features
    )
    rows, experts = x.shape[0], offsets.shape[0]
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    width = block_width(bits, group_size, in_features)
    block_n, block_m, warps, stages = expert_tile(rows, experts, x.element_size())
    exact = x.dtype == torch.float32
    with on_device(x):
        grouped_linear_affine_kernel[(rows // block_m + experts + 1, cdiv(outputs, block_n))](
            x, low, high if high is not None else low, scales, zeros, offsets,
            bias if bias is not None else scales, out,
            rows, outputs, in_features, num_groups(group_size, in_features), low.shape[1], x.stride(0),
            EXPERTS=experts, EXPERTS_P2=experts_power_of_2(experts),
            BITS=bits, GROUP=group_size, WIDTH=width, BN=block_n, BM=block_m,
            EVEN_K=in_features % (PLANES[bits] * max(width, 16)) == 0, HAS_BIAS=bias is not None,
            # float32 weights are read through fp16 bit patterns, which hold a code of 8 bits exactly
            HALF=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16, COMPILED=COMPILED and not exact,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
