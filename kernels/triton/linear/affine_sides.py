"""Launches the Triton kernels of `qcompiler::linear_affine_sides`; the reference's result up to rounding.

Roads, chosen by `kernels/tuning`: "quads" on the float32 units for one to four
tokens; on tensor cores "dots" for a few, which scales sums instead of weights,
"gemm" for some more, "wide" for many, on Hopper "stream" for any number; or
the "dense" weight and a library matmul. Nothing waits for the device and every
buffer's size follows from the shapes, so all of it can stand in a CUDA graph.
Parts of sums are added by a second kernel in a fixed order: results are
reproducible bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width
from qcompiler.kernels.ops.linear_affine_gated import check_gated
from qcompiler.kernels.ops.linear_affine_sides import (
    check_linear_affine_sides,
    sides_per_block,
)
from qcompiler.kernels.triton.activation import gated_activation
from qcompiler.kernels.triton.launch import cdiv, early_start, half_of, on_device, token_rows
from qcompiler.kernels.triton.linear.affine_dense import dequantize_sides_kernel
from qcompiler.kernels.triton.linear.affine_dots import linear_affine_dots
from qcompiler.kernels.triton.linear.affine_gemm import linear_affine_gemm
from qcompiler.kernels.triton.linear.affine_quads import linear_affine_quads
from qcompiler.kernels.triton.linear.affine_stream_launch import MOST_BLOCK_M, linear_stream, stream_takes
from qcompiler.kernels.triton.linear.launch import affine_config, device_facts, split_target, sum_split
from qcompiler.kernels.triton.linear.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig, heuristic, token_bucket

COMPILED = not isinstance(linear_affine_gemm, InterpretedFunction)
_MOST_QUAD_TOKENS = 4
_DOTS_BITS = (2, 3, 4, 6)  # fit bfloat16's mantissa, and the high bits of a code lie in one byte
# Whether "quads", "dots" and "gemm" compute a gated linear's activation themselves, or a kernel of its own.
ACTIVATION_INSIDE = True


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
    activation: str | None = None,
) -> torch.Tensor:
    """`linear_affine_sides` (see `ops/`) by Triton; `config` overrides the table's choice.

    With an `activation` it is `linear_affine_sides_gated`.
    """
    check_linear_affine_sides(x, low, high, sides, bits, group_size, in_features)
    with on_device(x):
        return _launch(x, low, high, sides, bias, bits, group_size, in_features, config, activation)


def linear_affine_sides_gated_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation: str,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::linear_affine_sides_gated`."""
    check_gated(activation, low.shape[0])
    return linear_affine_sides_triton(
        x, low, high, sides, bias, bits, group_size, in_features, activation=activation
    )


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
    activation: str | None,
) -> torch.Tensor:
    out_features = low.shape[0]
    columns = out_features // 2 if activation is not None else out_features
    rows = token_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], columns))
    width = block_width(bits, group_size, in_features)
    if config is None:
        config = affine_config(rows, bits, group_size, out_features)
    if config.kind == "stream" and not (
        config.block_m <= MOST_BLOCK_M and stream_takes(rows, low, high, sides, bits, group_size, width)
    ):
        dtype = str(x.dtype).removeprefix("torch.")
        config = heuristic(bits, out_features, in_features, tokens, dtype, device_facts(x.device)[1])
    kind = config.kind
    # Fours of words lie within a block, and x is read as pairs of values.
    pairs = as_pairs(rows) if kind == "quads" and width >= 8 and tokens <= _MOST_QUAD_TOKENS else None
    if kind == "quads" and pairs is None:
        kind = "gemm"
        config = LinearConfig("gemm", 64, 16, config.split_k)
    if kind == "dots" and bits not in _DOTS_BITS:
        kind = "gemm"
    if kind in ("dots", "gemm", "wide") and width < 16:
        kind = "dense"  # narrower than a dot
    # A program of "gemm" takes eight gates and what goes with them at a time, one of "quads" a gate.
    fits = config.block_n % (16 if kind == "gemm" else 2) == 0
    inside = activation if ACTIVATION_INSIDE and fits else None
    if kind == "dense":
        y = _dense_product(rows, low, high, sides, bias, bits, group_size, config.split_k)
    elif kind == "stream":
        y = linear_stream(rows, low, high, sides, bias, bits, group_size, config)
    elif pairs is not None:
        y = _quads(rows, pairs, low, high, sides, bias, bits, group_size, width, config, inside)
    else:
        inside = None if kind == "wide" else inside
        y = _on_tensor_cores(kind, rows, low, high, sides, bias, bits, group_size, width, config, inside)
    if activation is not None and y.shape[1] != columns:
        y = gated_activation(y[:, :columns], y[:, columns:], activation)
    return y.view(*x.shape[:-1], columns)


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
    activation: str | None,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features, words = low.shape
    block_w = 128 * config.num_warps
    words_per_split = cdiv(cdiv(words, config.split_k), block_w) * block_w
    split = cdiv(words, words_per_split)
    out, target = split_target(x, out_features, split, activation=activation)
    linear_affine_quads[(cdiv(out_features, config.block_n), split)](
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
        HALF=half_of(x.dtype),
        STAGES=config.num_stages,
        ACTIVATION=activation if split == 1 else None,
        COMPILED=COMPILED,
        num_warps=config.num_warps,
        **early_start(x.device),
    )
    return sum_split(target, bias, out, activation)


def _on_tensor_cores(
    kind: str,
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    config: LinearConfig,
    activation: str | None,
) -> torch.Tensor:
    """By "dots", "gemm" or "wide"."""
    tokens, in_features = x.shape
    out_features = low.shape[0]
    tile = PLANES[bits] * width
    tiles = cdiv(in_features, tile)
    tiles_per_split = cdiv(tiles, config.split_k)
    split = cdiv(tiles, tiles_per_split)
    block_n = config.block_n
    own: dict[str, Any]
    if kind == "dots":
        kernel, low = linear_affine_dots, low.view(torch.int16)
        block_n = min(block_n, 16 * config.num_warps)
        parts = config.block_n // block_n
        own = {"PARTS": parts, "SIDES": sides_per_block(bits, group_size, in_features)}
        if split == 1 and parts % 2:
            activation = None  # gates and what they multiply are two tiles of a program
    else:
        kernel, own = linear_affine_gemm, {"WIDE": kind == "wide"}
    out, target = split_target(x, out_features, split, activation=activation)
    grid = (cdiv(out_features, config.block_n) * cdiv(tokens, config.block_m), split)
    kernel[grid](
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
        low.shape[1],
        x.stride(0),
        tiles_per_split,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        BN=block_n,
        BM=config.block_m,
        SPLIT=split,
        EVEN_K=in_features % tile == 0,
        HAS_BIAS=bias is not None and split == 1,
        HALF=half_of(x.dtype),
        ACTIVATION=activation if split == 1 else None,
        COMPILED=COMPILED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **own,
        **early_start(x.device),
    )
    return sum_split(target, bias, out, activation)


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
    rows = cdiv(out_features, slices)
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
    dequantize_sides_kernel[(cdiv(in_features, tile), cdiv(out_features, 32))](
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
        HALF=half_of(dtype),
        COMPILED=COMPILED,
        num_warps=4,
    )
    return weight
