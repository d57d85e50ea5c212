"""Rotary embedding of a strided [B, H, T, D] view: heads inside a fused projection are read in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.ops.rotary import broadcast_table
from qcompiler.kernels.triton.launch import (
    early_start,
    let_next_start,
    next_power_of_2,
    on_device,
    wait_for_earlier,
)

_TILE = 2048


@triton.jit
def _load_pairs(at, mask):
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def rotate_heads(
    x,
    cos,
    sin,
    out,
    live,
    live_table,
    ROTATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate the `live` heads at the pointers `x` [heads, 1] into `out`; rounded as x is, then as out is.

    cos and sin: Pointers [heads or 1, 1] to tables, of which the `live_table` are read.
    """
    half: tl.constexpr = ROTATED // 2
    if INTERLEAVED:  # neighbours are loaded together and split in registers
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = live & (both < ROTATED)
        table_mask = live_table & (both < ROTATED)
        a, b = _load_pairs(x + both, mask)
        cos_a, cos_b = _load_pairs(cos + both, table_mask)
        sin_a, sin_b = _load_pairs(sin + both, table_mask)
        y = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        y = tl.reshape(y, [y.shape[0], 2 * BLOCK_HALF]).to(x.dtype.element_ty)
        tl.store(out + both, y.to(out.dtype.element_ty), mask=mask)
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        mask = live & (pair < half)
        table_mask = live_table & (pair < half)
        a = tl.load(x + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + half + pair, mask=mask, other=0.0).to(tl.float32)
        cos_a = tl.load(cos + pair, mask=table_mask, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + half + pair, mask=table_mask, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + pair, mask=table_mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + half + pair, mask=table_mask, other=0.0).to(tl.float32)
        first = (a * cos_a - b * sin_a).to(x.dtype.element_ty)
        second = (b * cos_b + a * sin_b).to(x.dtype.element_ty)
        tl.store(out + pair, first.to(out.dtype.element_ty), mask=mask)
        tl.store(out + half + pair, second.to(out.dtype.element_ty), mask=mask)
    if ROTATED < D:
        rest = ROTATED + tl.arange(0, BLOCK_REST)[None, :]
        mask = live & (rest < D)
        tl.store(out + rest, tl.load(x + rest, mask=mask).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length"])
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    length,
    stride_x_batch,
    stride_x_head,
    stride_x_token,
    stride_cos_batch,
    stride_cos_head,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_head,
    stride_sin_token,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    HEADS: tl.constexpr,
    ROTATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B · T, H / BLOCK_HEADS)."""
    let_next_start(PDL)
    batch = tl.program_id(0).to(tl.int64) // length
    token = tl.program_id(0).to(tl.int64) % length
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    x = x_ptr + batch * stride_x_batch + token * stride_x_token + head * stride_x_head
    cos = cos_ptr + batch * stride_cos_batch + token * stride_cos_token + head * stride_cos_head
    sin = sin_ptr + batch * stride_sin_batch + token * stride_sin_token + head * stride_sin_head
    out = out_ptr + batch * stride_out_batch + token * stride_out_token + head * stride_out_head
    live = head < HEADS
    wait_for_earlier(PDL)
    rotate_heads(x, cos, sin, out, live, live, ROTATED, D, BLOCK_HALF, BLOCK_REST, INTERLEAVED)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """CUDA provider of `qcompiler::rotary`."""
    cos, sin = broadcast_table(x, cos), broadcast_table(x, sin)
    rotated, dim = cos.shape[-1], x.shape[-1]
    result = torch.empty_like(x)
    if result.numel() == 0:
        return result
    out = result if result.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
    source = x if x.stride(-1) == 1 else x.contiguous()
    cos = _unit_stride(cos.expand(*x.shape[:-1], rotated))
    sin = _unit_stride(sin.expand(*x.shape[:-1], rotated))
    views = [_four_dims(t) for t in (source, cos, sin, out)]
    batch, heads, length, _ = views[0].shape
    half = next_power_of_2(rotated // 2)
    block_heads = min(next_power_of_2(heads), max(1, _TILE // half))
    with on_device(x):
        rotary_kernel[(batch * length, -(-heads // block_heads))](
            *views, length, *(stride for t in views for stride in t.stride()[:3]),
            HEADS=heads, ROTATED=rotated, D=dim,
            BLOCK_HEADS=block_heads, BLOCK_HALF=half, BLOCK_REST=next_power_of_2(dim - rotated),
            INTERLEAVED=interleaved, num_warps=4, **early_start(x.device),
        )  # fmt: skip
    return out if out is result else result.copy_(out)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor) -> torch.Tensor:
    """View as [B, H, T, D]; missing leading dimensions become 1, surplus ones are folded into B."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, x.dim() - 4)
