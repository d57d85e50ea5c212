"""lut4 linears of all experts in one launch: rows sorted by expert, weights decoded in registers.

A program owns a tile of one expert's rows (`expert_rows.py`) and a tile of its output channels; the
product over K is that of `linear_lut4`'s GEMM (`lut4_tiles`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.lut4 import NESTED_BLOCK, num_blocks
from qcompiler.kernels.ops.grouped_linear_lut4 import check_grouped_linear_lut4
from qcompiler.kernels.triton.grouped.expert_rows import (
    expert_tile,
    experts_power_of_2,
    rows_of_program,
    store_tile,
)
from qcompiler.kernels.triton.launch import cdiv, half_of, on_device
from qcompiler.kernels.triton.linear.lut4 import weight_arguments
from qcompiler.kernels.triton.linear.lut4_codes import decode_asm
from qcompiler.kernels.triton.linear.lut4_kernels import lut4_tiles

UNITS = 16


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_lut4_kernel(
    x,
    units,
    values,
    absmax,
    nested_absmax,
    nested_offset,
    steps,
    offsets,
    bias,
    out,
    rows,
    N,
    K,
    blocks,
    nested_blocks,
    x_stride,
    EXPERTS: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    CROSS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Grid (rows // BM + EXPERTS + 1, cdiv(N, BN)).

    x [rows, K] rows x_stride apart; `blocks`, `nested_blocks` are those of one expert; out [rows, N] in
    x's dtype.
    """
    expert, start_row, last = rows_of_program(offsets, rows, tl.program_id(0), EXPERTS, EXPERTS_P2, BM)
    is_expert = expert < EXPERTS
    if start_row >= last:
        return
    held = tl.minimum(expert, EXPERTS - 1)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = start_row + tl.arange(0, BM)
    # Channels past the end read the last one and are not stored, so that no load of the weight needs a mask.
    channel = tl.minimum(rn, N - 1)
    offset = tl.zeros((BN,), dtype=tl.float32)
    if DOUBLE:
        offset += tl.load(nested_offset + held)
    acc = lut4_tiles(
        x, rm.to(tl.int64)[None, :] * x_stride, rm[None, :] < last,
        units, (held.to(tl.int64) * N + channel)[:, None] * (K // PER), values, absmax, nested_absmax, steps,
        channel, channel * 0 + held * blocks, channel * 0 + held * nested_blocks, offset,
        0, tl.where(is_expert, tl.cdiv(K // PER, UNITS), 0), K,
        PER, BLOCK, CROSS, DOUBLE, BN, BM, UNITS, EVEN_K, HALF, DECODE,
    )  # fmt: skip
    store_tile(out, acc, bias, held, rn, rm, last, is_expert, N, HAS_BIAS)


COMPILED = not isinstance(grouped_linear_lut4_kernel, InterpretedFunction)


def grouped_linear_lut4_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::grouped_linear_lut4`."""
    outputs = check_grouped_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, offsets, bias,
        quant_type, block_size, in_features,
    )  # fmt: skip
    rows, experts = x.shape[0], offsets.shape[0]
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    units, arguments, constants = weight_arguments(
        codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    values, absmax, nested, offset, _, steps = arguments
    per, blocks = constants["PER"], num_blocks(block_size, outputs, in_features)
    block_n, block_m, warps, stages = expert_tile(rows, experts, x.element_size())
    half = x.dtype != torch.float32
    with on_device(x):
        grouped_linear_lut4_kernel[(rows // block_m + experts + 1, cdiv(outputs, block_n))](
            x, units, values, absmax, nested, offset, steps, offsets.contiguous(),
            bias if bias is not None else values, out,
            rows, outputs, in_features, blocks, cdiv(blocks, NESTED_BLOCK), x.stride(0),
            EXPERTS=experts, EXPERTS_P2=experts_power_of_2(experts),
            PER=per, BLOCK=block_size, CROSS=constants["CROSS"], DOUBLE=constants["DOUBLE"],
            BN=block_n, BM=block_m, UNITS=UNITS, EVEN_K=in_features % (UNITS * per) == 0,
            HAS_BIAS=bias is not None, HALF=half_of(x.dtype),
            DECODE=decode_asm(quant_type, x.dtype) if COMPILED and half and per == 8 else "",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
