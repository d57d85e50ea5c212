"""Launches the Triton kernels of `qcompiler::linear_int8`; same result as the reference up to rounding."""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.ops.linear_int8 import check_linear_int8
from qcompiler.kernels.triton.launch import cdiv, half_of, token_rows
from qcompiler.kernels.triton.linear.int8_kernels import (
    PAIRS_BFLOAT16,
    PAIRS_FLOAT16,
    dequantize_int8_kernel,
    linear_int8_gemm,
    linear_int8_gemv,
)
from qcompiler.kernels.triton.linear.launch import choose_config, split_target, sum_split
from qcompiler.kernels.triton.linear.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig

COMPILED = not isinstance(linear_int8_gemm, InterpretedFunction)


def linear_int8_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_int8` (see `ops/linear_int8.py`) by Triton; `config` overrides the choice of kernel."""
    check_linear_int8(x, codes, scales)
    rows = token_rows(x)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], codes.shape[0]))
    codes = codes.contiguous()
    if config is None:
        config = choose_config("linear_int8/int8_channel", rows, codes.shape[0])
    if config.kind == "dense":
        weight = dequantize_int8_triton(codes, scales, x.dtype)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = int8_product(rows, codes, scales, bias, x.dtype, config)
    return y.view(*x.shape[:-1], codes.shape[0])


def int8_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    config: LinearConfig,
) -> torch.Tensor:
    """Product x · (codes · scales)ᵀ + bias by the fused kernels.

    Args:
        x: [tokens, in_features], tokens > 0; any float dtype for a GEMV, half precision for a GEMM.
        codes: int8 [out_features, in_features], contiguous.
        scales: [out_features].
        bias: [out_features] or None.
        dtype: Of the result.
        config: The kernel; not "dense".

    Returns:
        [tokens, out_features].
    """
    tokens, in_features = x.shape
    out_features = codes.shape[0]
    words = in_features % 4 == 0 and codes.data_ptr() % 4 == 0
    per = 4 if words else 1
    gemv = config.kind == "gemv"
    tile = 64 if gemv else 32
    tiles = cdiv(in_features // per, tile)
    per_split = cdiv(tiles, config.split_k)
    split = cdiv(tiles, per_split)
    out, target = split_target(x, out_features, split, dtype)
    blocks_n = cdiv(out_features, config.block_n)
    extra: dict[str, object]
    grid: tuple[int, ...]
    half = half_of(x.dtype)
    source = x
    if gemv:
        pairs = as_pairs(x) if words else None
        source = x if pairs is None else pairs
        kernel, grid = linear_int8_gemv, (blocks_n, split, tokens)
        extra = {"PAIRS": pairs is not None, "HALF": half, "COMPILED": COMPILED}
    else:
        decode = (PAIRS_FLOAT16 if half == tl.float16 else PAIRS_BFLOAT16) if COMPILED and words else ""
        kernel, grid = linear_int8_gemm, (blocks_n * cdiv(tokens, config.block_m), split)
        extra = {
            "BM": config.block_m,
            "HALF": half,
            "DECODE": decode,
        }
    kernel[grid](
        source,
        codes.view(torch.int32) if words else codes,
        scales,
        bias if bias is not None else scales,
        target,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        per_split,
        PER=per,
        BN=config.block_n,
        UNITS=tile,
        SPLIT=split,
        EVEN_K=in_features % (tile * per) == 0,
        HAS_BIAS=bias is not None and split == 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **extra,
    )
    return sum_split(target, bias, out)


def dequantize_int8_triton(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [out_features, in_features] in `dtype`, rounded once from float32."""
    out_features, in_features = codes.shape
    weight = torch.empty((out_features, in_features), dtype=dtype, device=codes.device)
    grid = (out_features, cdiv(in_features, 2048))
    dequantize_int8_kernel[grid](codes, scales, weight, in_features, BLOCK=2048, num_warps=4)
    return weight
