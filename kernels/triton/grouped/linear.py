"""One linear per expert over rows sorted by expert, all experts in one launch.

A program owns a tile of rows of one expert (`expert_rows.py`) and a tile of its outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.ops.grouped_linear import check_shapes
from qcompiler.kernels.triton.grouped.expert_rows import experts_power_of_2, rows_of_program
from qcompiler.kernels.triton.launch import next_power_of_2, on_device


@triton.jit(do_not_specialize=["rows"])
def grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    rows,
    inputs,
    outputs,
    stride_x_row,
    stride_w_expert,
    stride_w_out,
    stride_w_in,
    stride_bias,
    EXPERTS: tl.constexpr,
    EXPERTS_P2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (rows // BLOCK_M + EXPERTS + 1, outputs / BLOCK_N). out [rows, outputs] is contiguous."""
    expert, start_row, last = rows_of_program(
        offsets_ptr, rows, tl.program_id(0), EXPERTS, EXPERTS_P2, BLOCK_M
    )
    if start_row >= last:
        return
    is_expert = expert < EXPERTS
    row = start_row + tl.arange(0, BLOCK_M)

    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_mask = row < last
    column_mask = column < outputs
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    x_at = x_ptr + row.to(tl.int64)[:, None] * stride_x_row + k[None, :]
    w_at = weight_ptr + tl.minimum(expert, EXPERTS - 1).to(tl.int64) * stride_w_expert
    w_at += column.to(tl.int64)[None, :] * stride_w_out + k.to(tl.int64)[:, None] * stride_w_in
    for start in tl.range(0, tl.where(is_expert, inputs, 0), BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_at, mask=column_mask[None, :], other=0.0)
        else:
            inside = k < inputs - start
            x = tl.load(x_at, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at, mask=column_mask[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_w_in
    if BIAS:
        bias_at = bias_ptr + tl.minimum(expert, EXPERTS - 1).to(tl.int64) * stride_bias + column
        acc += tl.load(bias_at, mask=column_mask & is_expert, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def tile(rows: int, experts: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for `rows` spread evenly over `experts`."""
    block_m = min(max(next_power_of_2(-(-rows // experts)), 16), 128)
    if itemsize == 4:
        return min(block_m, 32), 64, 32, 4, 2
    if block_m == 128:
        return 128, 128, 64, 8, 3
    return block_m, 64 if block_m < 64 else 128, 64, 4, 3


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::grouped_linear`."""
    rows, inputs = x.shape
    outputs = check_shapes(x, weight, transposed)
    out = x.new_empty(rows, outputs)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    experts = weight.shape[0]
    stride_expert, stride_in, stride_out = weight.stride()
    if not transposed:
        stride_in, stride_out = stride_out, stride_in
    block_m, block_n, block_k, warps, stages = tile(rows, experts, x.element_size())
    with on_device(x):
        grouped_linear_kernel[(rows // block_m + experts + 1, -(-outputs // block_n))](
            x, weight, offsets, bias, out, rows, inputs, outputs,
            x.stride(0), stride_expert, stride_out, stride_in, 0 if bias is None else bias.stride(0),
            EXPERTS=experts, EXPERTS_P2=experts_power_of_2(experts),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, EVEN_K=inputs % block_k == 0,
            BIAS=bias is not None, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
