"""Rotary embedding of a strided [B, H, T, D] view: heads inside a fused projection are read in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.ops.rotary import broadcast_table
from qcompiler.kernels.triton.launch import next_power_of_2, on_device

_TILE = 2048


@triton.jit
def _load_pairs(at, mask, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    return tl.split(tl.reshape(tl.load(at, mask=mask, other=0.0).to(tl.float32), [ROWS, PAIRS, 2]))


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
):
    """Grid: (B · T, H / BLOCK_HEADS)."""
    batch = tl.program_id(0).to(tl.int64) // length
    token = tl.program_id(0).to(tl.int64) % length
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    half: tl.constexpr = ROTATED // 2
    mask = (head < HEADS) & (pair < half)
    x = x_ptr + batch * stride_x_batch + token * stride_x_token + head * stride_x_head
    cos = cos_ptr + batch * stride_cos_batch + token * stride_cos_token + head * stride_cos_head
    sin = sin_ptr + batch * stride_sin_batch + token * stride_sin_token + head * stride_sin_head
    out = out_ptr + batch * stride_out_batch + token * stride_out_token + head * stride_out_head
    if INTERLEAVED:  # neighbours are loaded together and split in registers
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both_mask = (head < HEADS) & (both < ROTATED)
        a, b = _load_pairs(x + both, both_mask, BLOCK_HEADS, BLOCK_HALF)
        cos_a, cos_b = _load_pairs(cos + both, both_mask, BLOCK_HEADS, BLOCK_HALF)
        sin_a, sin_b = _load_pairs(sin + both, both_mask, BLOCK_HEADS, BLOCK_HALF)
        y = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        y = tl.reshape(y, [BLOCK_HEADS, 2 * BLOCK_HALF])
        tl.store(out + both, y.to(out_ptr.dtype.element_ty), mask=both_mask)
    else:
        a = tl.load(x + pair, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + half + pair, mask=mask, other=0.0).to(tl.float32)
        cos_a = tl.load(cos + pair, mask=mask, other=0.0).to(tl.float32)
        cos_b = tl.load(cos + half + pair, mask=mask, other=0.0).to(tl.float32)
        sin_a = tl.load(sin + pair, mask=mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin + half + pair, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + pair, (a * cos_a - b * sin_a).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + half + pair, (b * cos_b + a * sin_b).to(out_ptr.dtype.element_ty), mask=mask)
    if ROTATED < D:
        rest = ROTATED + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = (head < HEADS) & (rest < D)
        tl.store(out + rest, tl.load(x + rest, mask=rest_mask), mask=rest_mask)


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
            INTERLEAVED=interleaved, num_warps=4,
        )  # fmt: skip
    return out if out is result else result.copy_(out)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _four_dims(x: torch.Tensor) -> torch.Tensor:
    """View as [B, H, T, D]; missing leading dimensions become 1, surplus ones are folded into B."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, x.dim() - 4)
