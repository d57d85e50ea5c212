"""Launches the Triton kernels of `qcompiler::linear_lut4`; same result as the reference up to rounding.

Nothing waits for the device and every buffer's size follows from the shapes. Split-K parts are
summed in a fixed order: results are reproducible bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.lut4 import dynamic_map, table
from qcompiler.kernels.ops.linear_lut4 import check_linear_lut4
from qcompiler.kernels.triton.launch import cdiv, half_of, token_rows
from qcompiler.kernels.triton.linear.launch import choose_config, split_target, sum_split
from qcompiler.kernels.triton.linear.lut4_codes import decode_asm
from qcompiler.kernels.triton.linear.lut4_kernels import (
    dequantize_lut4_kernel,
    linear_lut4_gemm,
    linear_lut4_gemv,
)
from qcompiler.kernels.triton.linear.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig

COMPILED = not isinstance(linear_lut4_gemm, InterpretedFunction)


def linear_lut4_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_lut4` (see `ops/linear_lut4.py`) by Triton; `config` overrides the choice of kernel."""
    check_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    out_features = codes.shape[0]
    rows = token_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if config is None:
        config = choose_config(
            f"linear_lut4/{quant_type}-b{block_size}{'-double' if nested_offset is not None else ''}",
            rows,
            out_features,
        )
    statistics = (absmax, nested_absmax, nested_offset, part_rows)
    if config.kind == "dense":
        weight = dequantize_lut4_triton(codes, *statistics, quant_type, block_size, in_features, x.dtype)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
        return y.view(*x.shape[:-1], out_features)

    units, arguments, constants = weight_arguments(codes, *statistics, quant_type, block_size, in_features)
    per = constants["PER"]
    gemv = config.kind == "gemv"
    tile = 64 if gemv else 16
    tiles = cdiv(in_features // per, tile)
    per_split = cdiv(tiles, config.split_k)
    split = cdiv(tiles, per_split)
    out, target = split_target(rows, out_features, split)
    blocks_n = cdiv(out_features, config.block_n)
    extra: dict[str, object]
    grid: tuple[int, ...]
    half = half_of(x.dtype)
    source = rows
    if gemv:
        pairs = as_pairs(rows)
        source = rows if pairs is None else pairs
        kernel, grid = linear_lut4_gemv, (blocks_n, split, tokens)
        extra = {"PAIRS": pairs is not None, "HALF": half, "COMPILED": COMPILED}
    else:
        kernel, grid = linear_lut4_gemm, (blocks_n * cdiv(tokens, config.block_m), split)
        extra = {
            "BM": config.block_m,
            "HALF": half,
            "DECODE": decode_asm(quant_type, x.dtype) if COMPILED and per == 8 else "",
        }
    kernel[grid](
        source,
        units,
        *arguments,
        bias if bias is not None else absmax,
        target,
        tokens,
        out_features,
        in_features,
        rows.stride(0),
        per_split,
        **constants,
        BN=config.block_n,
        UNITS=tile,
        SPLIT=split,
        EVEN_K=in_features % (tile * per) == 0,
        HAS_BIAS=bias is not None and split == 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **extra,
    )
    return sum_split(target, bias, out).view(*x.shape[:-1], out_features)


def dequantize_lut4_triton(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight [out_features, in_features] in `dtype`; equals the format's `dequantize`."""
    units, arguments, constants = weight_arguments(
        codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features
    )
    weight = torch.empty((codes.shape[0], in_features), dtype=dtype, device=codes.device)
    grid = (cdiv(in_features, 32 * constants["PER"]), cdiv(codes.shape[0], 16))
    dequantize_lut4_kernel[grid](
        units, *arguments, weight, codes.shape[0], in_features, **constants, BN=16, UNITS=32, num_warps=4
    )
    return weight


def weight_arguments(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], dict[str, int]]:
    """Units of the codes, and what all kernels take of the statistics; absent tensors are never read."""
    words = in_features % 8 == 0 and codes.data_ptr() % 4 == 0 and codes.is_contiguous()
    values, steps = _tables(quant_type, codes.device)
    arguments = (
        values,
        absmax.contiguous(),
        nested_absmax if nested_absmax is not None else values,
        nested_offset if nested_offset is not None else values,
        part_rows if part_rows is not None else values,
        steps,
    )
    constants = {
        "PER": 8 if words else 2,
        "BLOCK": block_size,
        "CROSS": in_features % block_size != 0,
        "DOUBLE": nested_offset is not None,
        "PARTS": part_rows.shape[0] if part_rows is not None else 0,
    }
    codes = codes.contiguous()
    return (codes.view(torch.int32) if words else codes), arguments, constants


@lru_cache(maxsize=32)
def _tables(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values and the dynamic map on the device; made at the first call, before any graph capture."""
    return table(quant_type).to(device), dynamic_map().to(device)
