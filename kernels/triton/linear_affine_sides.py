"""Launches the Triton kernels of `qcompiler::linear_affine_sides`; the reference's result up to rounding.

Roads, chosen by `kernels/tuning`: "quads" on the float32 units for one to four
tokens; on tensor cores "stream" for any number on Hopper, elsewhere "gemm" for
a few and "wide" for many; or the "dense" weight and a library matmul. Nothing
waits for the device and every buffer's size follows from the shapes, so all of
it can stand in a CUDA graph. Parts of sums are added by a second kernel in a
fixed order: results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width
from qcompiler.kernels.ops.linear_affine_sides import (
    check_linear_affine_sides,
    sides_per_block,
)
from qcompiler.kernels.triton.launch import on_device
from qcompiler.kernels.triton.linear_affine_dense import dequantize_sides_kernel
from qcompiler.kernels.triton.linear_affine_gemm import linear_affine_gemm
from qcompiler.kernels.triton.linear_affine_quads import linear_affine_quads
from qcompiler.kernels.triton.linear_launch import device_facts, split_target, sum_split
from qcompiler.kernels.triton.linear_stream import linear_stream, stream_takes
from qcompiler.kernels.triton.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig, heuristic, linear_config, token_bucket

COMPILED = not isinstance(linear_affine_gemm, InterpretedFunction)
_MOST_QUAD_TOKENS = 4


def linear_affine_sides_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_affine_sides` (see `ops/`) by Triton; `config` overrides the table's choice."""
    check_linear_affine_sides(x, low, high, sides, bits, group_size, in_features)
    with on_device(x):
        return _launch(x, low, high, sides, bias, bits, group_size, in_features, config)


def _launch(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    config: LinearConfig | None,
) -> torch.Tensor:
    out_features = low.shape[0]
    rows = x.reshape(-1, in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    width = block_width(bits, group_size, in_features)
    if config is None:
        config = _configured(rows, bits, group_size, out_features)
    if config.kind == "stream" and not stream_takes(rows, low, high, sides, bits, group_size, width):
        dtype = str(x.dtype).removeprefix("torch.")
        config = heuristic(bits, out_features, in_features, tokens, dtype, device_facts(x.device)[1])
    kind = config.kind
    # Fours of words lie within a block, and x is read as pairs of values.
    pairs = as_pairs(rows) if kind == "quads" and width >= 8 and tokens <= _MOST_QUAD_TOKENS else None
    if kind == "quads" and pairs is None:
        kind = "gemm"
        config = LinearConfig("gemm", 64, 16, config.split_k)
    if kind in ("gemm", "wide") and width < 16:
        kind = "dense"  # narrower than a dot
    if kind == "dense":
        y = _dense_product(rows, low, high, sides, bias, bits, group_size, config.split_k)
    elif kind == "stream":
        y = linear_stream(rows, low, high, sides, bias, bits, group_size, config)
    elif pairs is not None:
        y = _quads(rows, pairs, low, high, sides, bias, bits, group_size, width, config)
    else:
        y = _gemm(rows, low, high, sides, bias, bits, group_size, width, config, wide=kind == "wide")
    return y.view(*x.shape[:-1], out_features)


def _configured(x: torch.Tensor, bits: int, group_size: int, out_features: int) -> LinearConfig:
    gpu, sms = device_facts(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    bucket = token_bucket(x.shape[0])
    return linear_config(gpu, sms, bits, group_size, out_features, x.shape[1], bucket, dtype)


def _quads(
    x: torch.Tensor,
    pairs: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    config: LinearConfig,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features, words = low.shape
    block_w = 128 * config.num_warps
    words_per_split = triton.cdiv(triton.cdiv(words, config.split_k), block_w) * block_w
    split = triton.cdiv(words, words_per_split)
    out, target = split_target(x, out_features, split)
    linear_affine_quads[(triton.cdiv(out_features, config.block_n), split)](
        pairs,
        low,
        high if high is not None else low,
        sides,
        bias if bias is not None else x,
        target,
        tokens,
        out_features,
        in_features,
        sides.shape[1],
        words,
        pairs.stride(0),
        words_per_split,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        SIDES=sides_per_block(bits, group_size, in_features),
        BN=config.block_n,
        BM=token_bucket(tokens),
        BW=block_w,
        SPLIT=split,
        EVEN=words % words_per_split == 0 and in_features % (PLANES[bits] * width) == 0,
        HAS_BIAS=bias is not None and split == 1,
        HALF=_half(x.dtype),
        STAGES=config.num_stages,
        COMPILED=COMPILED,
        num_warps=config.num_warps,
    )
    return sum_split(target, bias, out)


def _gemm(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    config: LinearConfig,
    *,
    wide: bool,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features, words = low.shape
    tile = PLANES[bits] * width
    tiles = triton.cdiv(in_features, tile)
    tiles_per_split = triton.cdiv(tiles, config.split_k)
    split = triton.cdiv(tiles, tiles_per_split)
    out, target = split_target(x, out_features, split)
    grid = (triton.cdiv(out_features, config.block_n) * triton.cdiv(tokens, config.block_m), split)
    linear_affine_gemm[grid](
        x,
        low,
        high if high is not None else low,
        sides,
        bias if bias is not None else x,
        target,
        tokens,
        out_features,
        in_features,
        sides.shape[1],
        words,
        x.stride(0),
        tiles_per_split,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        WIDE=wide,
        BN=config.block_n,
        BM=config.block_m,
        SPLIT=split,
        EVEN_K=in_features % tile == 0,
        HAS_BIAS=bias is not None and split == 1,
        HALF=_half(x.dtype),
        COMPILED=COMPILED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return sum_split(target, bias, out)


def _dense_product(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    slices: int,
) -> torch.Tensor:
    """By the library's matmul; a dense weight in slices of output channels need never leave the L2 cache."""
    out_features, in_features = low.shape[0], x.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    rows = triton.cdiv(out_features, slices)
    if rows == out_features:
        weight = _dense(low, high, sides, bits, group_size, in_features, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty((x.shape[0], out_features))
    for first in range(0, out_features, rows):
        part = slice(first, first + rows)
        upper = None if high is None else high[part]
        # The allocator gives every slice the memory of the one before.
        weight = _dense(low[part], upper, sides[part], bits, group_size, in_features, x.dtype)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, part])
        else:
            torch.addmm(bias[part], x, weight.t(), out=y[:, part])
        del weight
    return y


def _dense(
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight [out_features, in_features] in `dtype`."""
    out_features, words = low.shape
    width = block_width(bits, group_size, in_features)
    weight = torch.empty((out_features, in_features), dtype=dtype, device=low.device)
    tile = PLANES[bits] * width
    dequantize_sides_kernel[(triton.cdiv(in_features, tile), triton.cdiv(out_features, 32))](
        low,
        high if high is not None else low,
        sides,
        weight,
        out_features,
        in_features,
        sides.shape[1],
        words,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        BN=32,
        HALF=_half(dtype),
        COMPILED=COMPILED,
        num_warps=4,
    )
    return weight


def _half(dtype: torch.dtype) -> tl.dtype:
    return tl.float16 if dtype == torch.float16 else tl.bfloat16
