"""Launches the Triton kernels of `qcompiler::linear_affine`; same result as the reference up to rounding.

On 16-bit activations the roads are those of `linear_affine_sides`, whose
prepared scales are made on the way; a runtime prepares them once instead
(`kernels/providers.py`). What those cannot take runs here: float32, which
must not be rounded, and blocks of codes narrower than a dot. A few tokens
then go to a GEMV on the float32 units, more to the dense weight and a library
matmul. Nothing waits for the device and every buffer's size follows from the
shapes, so all of it can stand in a CUDA graph. Split-K parts are summed by a
second kernel in a fixed order: results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width, num_groups
from qcompiler.kernels.ops.linear_affine import check_linear_affine
from qcompiler.kernels.ops.linear_affine_gated import check_gated
from qcompiler.kernels.ops.linear_affine_sides import pack_sides
from qcompiler.kernels.triton.activation import gated_activation
from qcompiler.kernels.triton.launch import cdiv, half_of, on_device, token_rows
from qcompiler.kernels.triton.linear.affine_gemv import dequantize_affine_kernel, linear_affine_gemv
from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton
from qcompiler.kernels.triton.linear.launch import affine_config, split_target, sum_split
from qcompiler.kernels.triton.linear.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig, token_bucket

COMPILED = not isinstance(linear_affine_gemv, InterpretedFunction)
_MOST_GEMV_TOKENS = 8


def linear_affine_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    config: LinearConfig | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """`linear_affine` (see `ops/linear_affine.py`) by Triton; `config` overrides the table's choice.

    With an `activation` it is `linear_affine_gated`.
    """
    check_linear_affine(x, low, high, scales, bits, group_size, in_features)
    with on_device(x):
        return _launch(x, low, high, scales, zeros, bias, bits, group_size, in_features, config, activation)


def linear_affine_gated_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    activation: str,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::linear_affine_gated`."""
    check_gated(activation, low.shape[0])
    return linear_affine_triton(
        x, low, high, scales, zeros, bias, bits, group_size, in_features, activation=activation
    )


def _launch(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    config: LinearConfig | None,
    activation: str | None,
) -> torch.Tensor:
    out_features = low.shape[0]
    columns = out_features if activation is None else out_features // 2
    rows = token_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], columns))
    if config is None:
        config = affine_config(rows, bits, group_size, out_features)
    prepared = x.dtype != torch.float32 and block_width(bits, group_size, in_features) >= 16
    if prepared and config.kind not in ("gemv", "dense"):
        sides = pack_sides(scales, zeros, bits, group_size, in_features, x.dtype, check=False)
        y = linear_affine_sides_triton(
            rows, low, high, sides, bias, bits, group_size, in_features, config, activation
        )
    elif config.kind != "dense" and tokens <= _MOST_GEMV_TOKENS:
        y = _gemv(rows, low, high, scales, zeros, bias, bits, group_size, config)
    else:
        weight = dequantize_triton(low, high, scales, zeros, bits, group_size, in_features, x.dtype)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    if activation is not None and y.shape[1] != columns:
        y = gated_activation(y[:, :columns], y[:, columns:], activation)
    return y.view(*x.shape[:-1], columns)


def _gemv(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    config: LinearConfig,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features, words = low.shape
    width = block_width(bits, group_size, in_features)
    tile = PLANES[bits] * max(width, 16)
    tiles = cdiv(in_features, tile)
    tiles_per_split = cdiv(tiles, config.split_k)
    split = cdiv(tiles, tiles_per_split)
    out, target = split_target(x, out_features, split)
    half = half_of(x.dtype)
    # Only the GEMV's own configurations say how many channels and warps suit it.
    own = config.kind == "gemv"
    block_n = config.block_n if own else 16
    linear_affine_gemv[(cdiv(out_features, block_n), split)](
        x,
        low,
        high if high is not None else low,
        scales,
        zeros,
        bias if bias is not None else scales,
        target,
        tokens,
        out_features,
        in_features,
        num_groups(group_size, in_features),
        words,
        x.stride(0),
        tiles_per_split,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        BN=block_n,
        BM=token_bucket(tokens),
        SPLIT=split,
        PAIRS=as_pairs(x) is not None,
        EVEN_K=in_features % tile == 0,
        HAS_BIAS=bias is not None and split == 1,
        HALF=half,
        COMPILED=COMPILED,
        num_warps=config.num_warps if own else 4,
        num_stages=config.num_stages if own else 2,
    )
    return sum_split(target, bias, out)


def dequantize_triton(
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight [out_features, in_features] in `dtype`, equal to the format's `dequantize`."""
    out_features, words = low.shape
    width = block_width(bits, group_size, in_features)
    weight = torch.empty((out_features, in_features), dtype=dtype, device=low.device)
    tile = PLANES[bits] * max(width, 16)
    dequantize_affine_kernel[(cdiv(in_features, tile), cdiv(out_features, 32))](
        low,
        high if high is not None else low,
        scales,
        zeros,
        weight,
        out_features,
        in_features,
        num_groups(group_size, in_features),
        words,
        BITS=bits,
        GROUP=group_size,
        WIDTH=width,
        BN=32,
        COMPILED=COMPILED,
        num_warps=4,
    )
    return weight
