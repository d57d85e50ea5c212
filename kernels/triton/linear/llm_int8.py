"""LLM.int8() in Triton: row-wise quantization, an int8 product, and the outlier columns in the same kernel.

Columns with an outlier are gathered by number in a second loop of the product. The first loop runs
over all columns, those included: there the code of an outlier is 0, and the second loop adds what
the codes of such a column leave, x - code·absmax/127, times the weight. So the sum is that of the
reference, and no kernel has to look at flags inside the integer loop.

One or two tokens need no integers: x is quantized and dequantized once and meets the int8 weight in
the GEMV of `linear_int8`. Nothing waits for the device; every size follows from the shapes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.ops.linear_int8 import check_linear_int8
from qcompiler.kernels.triton.launch import cdiv, token_rows
from qcompiler.kernels.triton.linear.int8 import int8_product
from qcompiler.kernels.triton.linear.launch import choose_config
from qcompiler.kernels.tuning.tables import LinearConfig

# Adding and subtracting 1.5·2^23 rounds a float32 below 2^22 to an integer, halves to even.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def quantize_rows_kernel(x, codes, absmax, flags, K, x_stride, codes_stride, limit, BLOCK: tl.constexpr):
    """Grid M: int8 codes and absmax of one row over its elements below `limit`; flags columns with others.

    codes [M, codes_stride]: entries from K on are set to zero. flags int8 [K] start as zero; several rows
    may write the same 1.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + lane
        magnitude = tl.abs(tl.load(x + k, mask=k < K, other=0.0).to(tl.float32))
        outlier = magnitude >= limit
        largest = tl.maximum(largest, tl.where(outlier, 0.0, magnitude))
        tl.store(flags + k, tl.full((BLOCK,), 1, tl.int8), mask=outlier & (k < K))
    row_max = tl.max(largest, axis=0)
    factor = tl.div_rn(127.0, tl.maximum(row_max, 1e-30))
    for start in range(0, codes_stride, BLOCK):
        k = start + lane
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        rounded = tl.where(tl.abs(value) >= limit, 0.0, (value * factor + _ROUND) - _ROUND)
        tl.store(codes + k, rounded.to(tl.int8), mask=k < codes_stride)
    tl.store(absmax + row, row_max)


@triton.jit
def list_columns_kernel(flags, columns, K, BLOCK: tl.constexpr):
    """Grid 1: the numbers of the flagged columns, ascending, and their count in columns[K]."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, K, BLOCK):
        k = start + lane
        flag = tl.load(flags + k, mask=k < K, other=0).to(tl.int32)
        tl.store(columns + count + tl.cumsum(flag, axis=0) - flag, k, mask=flag != 0)
        count += tl.sum(flag, axis=0)
    tl.store(columns + K, count)


@triton.jit
def round_rows_kernel(x, out, M, K, x_stride, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid M ≤ ROWS: out [M, K] float32 is x as its int8 codes stand for it, outlier columns as they are."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + lane
        magnitude = tl.abs(tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(magnitude >= limit, 0.0, magnitude))
    row_max = tl.max(largest, axis=0)
    factor = tl.div_rn(127.0, tl.maximum(row_max, 1e-30))
    for start in range(0, K, BLOCK):
        k = start + lane
        value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        outlier = tl.abs(value) >= limit
        for other in tl.static_range(ROWS):
            in_x = (k < K) & (other < M)
            outlier |= tl.abs(tl.load(x + other * x_stride + k, mask=in_x, other=0.0).to(tl.float32)) >= limit
        rounded = ((value * factor + _ROUND) - _ROUND) * (row_max / 127.0)
        tl.store(out + row * K + k, tl.where(outlier, value, rounded), mask=k < K)


@triton.jit
def linear_llm_int8_gemm(
    x,
    x_codes,
    x_absmax,
    columns,
    codes,
    scales,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    x_codes_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Grid cdiv(N, BN)·cdiv(M, BM); yᵀ [BN, BM].

    x_codes int8 [M, x_codes_stride], zero from K on; columns int32 [K + 1] from `list_columns_kernel`;
    out [M, N]. HALF is the dtype that outlier columns are multiplied in.
    """
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BM)
    rn = (pid // tiles_m) * BN + tl.arange(0, BN)
    rm = (pid % tiles_m) * BM + tl.arange(0, BM)
    row = tl.minimum(rn, N - 1)
    token = tl.minimum(rm, M - 1)
    w_rows = codes + row.to(tl.int64)[:, None] * K
    xq_rows = x_codes + token.to(tl.int64)[None, :] * x_codes_stride
    x_rows = x + token.to(tl.int64)[None, :] * x_stride
    lane = tl.arange(0, BK)
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for start in range(0, K, BK):
        k = start + lane
        if EVEN_K:
            w = tl.load(w_rows + k[None, :])
            xq = tl.load(xq_rows + k[:, None])
        else:
            w = tl.load(w_rows + k[None, :], mask=k[None, :] < K, other=0)
            xq = tl.load(xq_rows + k[:, None], mask=k[:, None] < K, other=0)
        acc = tl.dot(w, xq, acc, out_dtype=tl.int32)

    x_scale = tl.load(x_absmax + token)[None, :] / 127.0
    y = acc.to(tl.float32) * x_scale
    count = tl.load(columns + K)
    for start in range(0, count, BO):
        at = start + tl.arange(0, BO)
        k = tl.load(columns + at, mask=at < count, other=0)
        value = tl.load(x_rows + k[:, None]).to(tl.float32)
        left = value - tl.load(xq_rows + k[:, None]).to(tl.float32) * x_scale
        left = tl.where((at < count)[:, None], left, 0.0)
        w = tl.load(w_rows + k[None, :])
        y = tl.dot(w.to(HALF), left.to(HALF), y, input_precision="ieee")
    y *= tl.load(scales + row).to(tl.float32)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)[:, None]
    offsets = rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))


COMPILED = not isinstance(linear_llm_int8_gemm, InterpretedFunction)
_HALF = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def linear_llm_int8_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_llm_int8` (see `ops/linear_llm_int8.py`) by Triton; `config` overrides the choice of kernel."""
    check_linear_int8(x, codes, scales, "linear_llm_int8")
    out_features = codes.shape[0]
    rows = token_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    codes = codes.contiguous()
    limit = threshold if threshold > 0 else math.inf
    if config is None:
        config = choose_config("linear_llm_int8/int8_channel", rows, out_features)
        if config.kind == "dense":
            config = LinearConfig("gemm", 128, 128, 1, 8, 3)
    if config.kind == "gemv":
        y = _few_tokens(rows, codes, scales, bias, limit, config)
    else:
        y = _many_tokens(rows, codes, scales, bias, limit, config)
    return y.view(*x.shape[:-1], out_features)


def quantize_rows_triton(x: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 [tokens, K rounded up to 16], absmax float32 [tokens] and columns int32 [K + 1] of x."""
    tokens, in_features = x.shape
    stride = -(-in_features // 16) * 16
    codes = torch.empty((tokens, stride), dtype=torch.int8, device=x.device)
    absmax = torch.empty(tokens, dtype=torch.float32, device=x.device)
    flags = torch.zeros(in_features, dtype=torch.int8, device=x.device)
    columns = torch.empty(in_features + 1, dtype=torch.int32, device=x.device)
    block = min(4096, triton.next_power_of_2(in_features))
    # Contracted into one fma the rounding of value·factor would be skipped, and ties would fall otherwise.
    quantize_rows_kernel[(tokens,)](
        x,
        codes,
        absmax,
        flags,
        in_features,
        x.stride(0),
        stride,
        limit,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=False,
    )
    list_columns_kernel[(1,)](flags, columns, in_features, BLOCK=block, num_warps=8)
    return codes, absmax, columns


def _few_tokens(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    limit: float,
    config: LinearConfig,
) -> torch.Tensor:
    tokens, in_features = x.shape
    rounded = torch.empty((tokens, in_features), dtype=torch.float32, device=x.device)
    block = min(8192, triton.next_power_of_2(in_features))
    round_rows_kernel[(tokens,)](
        x,
        rounded,
        tokens,
        in_features,
        x.stride(0),
        limit,
        ROWS=triton.next_power_of_2(tokens),
        BLOCK=block,
        num_warps=16 if block > 4096 else 8,
        enable_fp_fusion=False,
    )
    return int8_product(rounded, codes, scales, bias, x.dtype, config)


def _many_tokens(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    limit: float,
    config: LinearConfig,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features = codes.shape[0]
    x_codes, absmax, columns = quantize_rows_triton(x, limit)
    out = x.new_empty((tokens, out_features))
    block_k = 128 if in_features > 64 else 64
    grid = (cdiv(out_features, config.block_n) * cdiv(tokens, config.block_m),)
    linear_llm_int8_gemm[grid](
        x,
        x_codes,
        absmax,
        columns,
        codes,
        scales,
        bias if bias is not None else scales,
        out,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        x_codes.stride(0),
        BN=config.block_n,
        BM=config.block_m,
        BK=block_k,
        BO=32,
        EVEN_K=in_features % block_k == 0,
        HAS_BIAS=bias is not None,
        HALF=_HALF[x.dtype] if COMPILED else tl.float32,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
