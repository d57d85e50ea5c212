"""Weight-only int8 linears of all experts in one launch: rows sorted by expert, codes decoded in registers.

A program owns a tile of one expert's rows (`expert_rows.py`) and a tile of its output channels; the
product over K is that of `linear_int8`'s GEMM (`int8_tiles`), the scales come once at its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.ops.grouped_linear_int8 import check_grouped_linear_int8
from qcompiler.kernels.triton.grouped.expert_rows import (
    expert_tile,
    experts_power_of_2,
    rows_of_program,
    store_tile,
)
from qcompiler.kernels.triton.launch import cdiv, half_of, on_device
from qcompiler.kernels.triton.linear.int8_kernels import PAIRS_BFLOAT16, PAIRS_FLOAT16, int8_tiles

UNITS = 32


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_int8_kernel(
    x,
    units,
    scales,
    offsets,
    bias,
    out,
    rows,
    N,
    K,
    x_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    PER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Grid (rows // BM + EXPERTS + 1, cdiv(N, BN)).

    x [rows, K] rows x_stride apart; out [rows, N] in x's dtype.
    """
    expert, start_row, last = rows_of_program(offsets, rows, tl.program_id(0), EXPERTS, EXPERTS_P2, BM)
    is_expert = expert < EXPERTS
    if start_row >= last:
        return
    held = tl.minimum(expert, EXPERTS - 1).to(tl.int64)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = start_row + tl.arange(0, BM)
    # Channels past the end read the last one and are not stored, so that no load of the weight needs a mask.
    channel = held * N + tl.minimum(rn, N - 1)
    acc = int8_tiles(
        x, rm.to(tl.int64)[None, :] * x_stride, rm[None, :] < last, units, channel[:, None] * (K // PER),
        0, tl.where(is_expert, tl.cdiv(K // PER, UNITS), 0), K, PER, BN, BM, UNITS, EVEN_K, HALF, DECODE,
    )  # fmt: skip
    acc *= tl.load(scales + channel).to(tl.float32)[:, None]
    store_tile(out, acc, bias, held, rn, rm, last, is_expert, N, HAS_BIAS)


COMPILED = not isinstance(grouped_linear_int8_kernel, InterpretedFunction)


def grouped_linear_int8_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::grouped_linear_int8`."""
    outputs = check_grouped_linear_int8(x, codes, scales, offsets, bias)
    (rows, in_features), experts = x.shape, offsets.shape[0]
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = codes.contiguous()
    bias = None if bias is None else bias.contiguous()
    words = in_features % 4 == 0 and codes.data_ptr() % 4 == 0
    per = 4 if words else 1
    block_n, block_m, warps, stages = expert_tile(rows, experts, x.element_size())
    pairs = {torch.float16: PAIRS_FLOAT16, torch.bfloat16: PAIRS_BFLOAT16}
    with on_device(x):
        grouped_linear_int8_kernel[(rows // block_m + experts + 1, cdiv(outputs, block_n))](
            x, codes.view(torch.int32) if words else codes, scales.contiguous(), offsets.contiguous(),
            bias if bias is not None else scales, out, rows, outputs, in_features, x.stride(0),
            EXPERTS=experts, EXPERTS_P2=experts_power_of_2(experts), PER=per,
            BN=block_n, BM=block_m, UNITS=UNITS, EVEN_K=in_features % (UNITS * per) == 0,
            HAS_BIAS=bias is not None, HALF=half_of(x.dtype),
            DECODE=pairs.get(x.dtype, "") if COMPILED and words else "",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
