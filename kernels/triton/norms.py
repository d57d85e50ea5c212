"""RMSNorm, residual addition with RMSNorm, and LayerNorm: whole rows per program, statistics in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.triton.launch import (
    as_rows,
    early_start,
    let_next_start,
    next_power_of_2,
    on_device,
    prefetch,
    wait_for_earlier,
)

# Elements of a program's tile: short rows (one attention head) are taken several at a time.
_TILE = 2048
_MAX_COLUMNS = 65536


@triton.jit
def _fetch_soon(weight, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The weight into the L2 cache, which what other layers read has driven it out of."""
    SECTOR: tl.constexpr = 256 // weight.dtype.element_ty.primitive_bitwidth
    if BLOCK >= SECTOR:
        prefetch(weight + tl.minimum(tl.arange(0, BLOCK // SECTOR) * SECTOR, COLUMNS - 1))


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (rows / BLOCK_ROWS,). out and, if ADD, total = x + residual are contiguous [rows, COLUMNS]."""
    let_next_start(PDL)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    x_at = row // x_inner * x_outer_stride + row % x_inner * x_inner_stride + column
    out_at = row * COLUMNS + column
    if PDL == 2 and WEIGHT:
        _fetch_soon(weight_ptr, COLUMNS, BLOCK)
    wait_for_earlier(PDL)
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        at = (
            row // residual_inner * residual_outer_stride
            + row % residual_inner * residual_inner_stride
            + column
        )
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_at, total, mask=mask)
        x = total.to(tl.float32)  # the norm sees the sum as it is stored
    mean = tl.sum(x * x, 1)[:, None] / COLUMNS
    y = x * tl.rsqrt(mean + eps)
    if CAST_FIRST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    if WEIGHT:
        y *= offset + tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (rows / BLOCK_ROWS,). out [rows, COLUMNS] is contiguous."""
    let_next_start(PDL)
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    x_at = row // x_inner * x_outer_stride + row % x_inner * x_inner_stride + column
    if PDL == 2 and WEIGHT:
        _fetch_soon(weight_ptr, COLUMNS, BLOCK)
    wait_for_earlier(PDL)
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / COLUMNS
    # Two passes over registers: the one-pass variance cancels when the mean is large.
    centred = tl.where(column < COLUMNS, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / COLUMNS
    y = centred * tl.rsqrt(variance + eps)
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * COLUMNS + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, cast_first: bool
) -> torch.Tensor:
    """CUDA provider of `qcompiler::rms_norm`."""
    return _rms_norm(x, None, weight, eps, offset, cast_first)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA provider of `qcompiler::add_rms_norm`."""
    if residual.shape != x.shape:
        residual = residual.expand(x.shape)
    return _rms_norm(x, residual, weight, eps, offset, cast_first)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """CUDA provider of `qcompiler::layer_norm`."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    block, block_rows, warps = _tile(x.shape[-1])
    x, rows, inner, outer_stride, inner_stride = as_rows(x)
    with on_device(x):
        layer_norm_kernel[(-(-rows // block_rows),)](
            x, _contiguous(weight), _contiguous(bias), out, rows, inner, outer_stride, inner_stride, eps,
            COLUMNS=x.shape[-1], BLOCK_ROWS=block_rows, BLOCK=block,
            WEIGHT=weight is not None, BIAS=bias is not None, num_warps=warps, **early_start(x.device),
        )  # fmt: skip
    return out


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = x.new_empty(x.shape)
    total = out if residual is None else torch.empty_like(out)
    if out.numel() == 0:
        return out, total
    block, block_rows, warps = _tile(x.shape[-1])
    x, rows, x_inner, x_outer_stride, x_inner_stride = as_rows(x)
    residual_inner, residual_outer_stride, residual_inner_stride = 1, 0, 0
    if residual is not None:
        residual, _, residual_inner, residual_outer_stride, residual_inner_stride = as_rows(residual)
    with on_device(x):
        rms_norm_kernel[(-(-rows // block_rows),)](
            x, residual, _contiguous(weight), out, total, rows,
            x_inner, x_outer_stride, x_inner_stride,
            residual_inner, residual_outer_stride, residual_inner_stride, eps, offset,
            COLUMNS=x.shape[-1],
            BLOCK_ROWS=block_rows, BLOCK=block, CAST_FIRST=cast_first,
            ADD=residual is not None, WEIGHT=weight is not None, num_warps=warps, **early_start(x.device),
        )  # fmt: skip
    return out, total


def _tile(columns: int) -> tuple[int, int, int]:
    """(columns padded to a power of two, rows per program, warps)."""
    if columns > _MAX_COLUMNS:
        raise InvalidInputError(f"norm: rows of {columns} elements exceed the kernel's {_MAX_COLUMNS}")
    block = next_power_of_2(columns)
    return block, max(1, _TILE // block), min(16, max(4, block // 1024))


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
