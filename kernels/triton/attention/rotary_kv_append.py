"""Rotate queries and keys of a step and scatter its keys and values into the paged cache, in one launch.

The programs of a token are blocks of query heads first, then blocks of key heads with their values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qcompiler.kernels.formats.kv_cache import kv_format, smallest_scale
from qcompiler.kernels.ops.kv_append_quantized import check_append
from qcompiler.kernels.ops.rotary_kv_append import check_plain_pages, check_rotary_append
from qcompiler.kernels.triton.attention.kv_append import check_channels, kv_append
from qcompiler.kernels.triton.attention.kv_append_quantized import (
    append_rows,
    channels_of,
    kv_append_quantized,
    store_rows,
)
from qcompiler.kernels.triton.attention.kv_codes import scale_words
from qcompiler.kernels.triton.launch import (
    early_start,
    let_next_start,
    next_power_of_2,
    on_device,
    wait_for_earlier,
)
from qcompiler.kernels.triton.rotary import rotary, rotate_heads

# Whether one kernel does it all, or those of the ops that it stands for do it in turn.
ONE_LAUNCH = True
_TILE = 1024  # channels of one program, where a head is not longer


@triton.jit
def _rotate_queries(
    q_ptr,
    cos,
    sin,
    out_ptr,
    token,
    block,
    stride_q_token,
    stride_q_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    x = q_ptr + token * stride_q_token + head * stride_q_head
    out = out_ptr + token * (HEADS * D) + head * D
    table = tl.full([1, 1], True, tl.int1)
    rotate_heads(x, cos, sin, out, head < HEADS, table, ROTATED, D, BLOCK_HALF, BLOCK_REST, INTERLEAVED)


@triton.jit
def rotary_kv_append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cos_token,
    stride_sin_token,
    stride_kp_page,
    stride_kp_slot,
    stride_kp_head,
    stride_vp_page,
    stride_vp_slot,
    stride_vp_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tokens, blocks of BLOCK_HEADS query heads and of as many key heads). out [tokens, HEADS, D]."""
    let_next_start(PDL)
    wait_for_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    cos = cos_ptr + token * stride_cos_token + tl.zeros([1, 1], tl.int32)
    sin = sin_ptr + token * stride_sin_token + tl.zeros([1, 1], tl.int32)
    if block < query_blocks:
        _rotate_queries(
            q_ptr, cos, sin, out_ptr, token, block, stride_q_token, stride_q_head,
            HEADS, D, ROTATED, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:  # else padding
            page = slot // PAGE_SIZE
            offset = slot % PAGE_SIZE
            head = ((block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
            live = head < KV_HEADS
            k_row = k_ptr + token * stride_k_token + head * stride_k_head
            k_target = k_pages_ptr + page * stride_kp_page + offset * stride_kp_slot + head * stride_kp_head
            column = tl.arange(0, BLOCK_DV)[None, :]
            mask = live & (column < DV)
            v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + column, mask=mask)
            table = tl.full([1, 1], True, tl.int1)
            rotate_heads(
                k_row, cos, sin, k_target, live, table, ROTATED, D, BLOCK_HALF, BLOCK_REST, INTERLEAVED
            )
            v_target = v_pages_ptr + page * stride_vp_page + offset * stride_vp_slot + head * stride_vp_head
            tl.store(v_target + column, v.to(v_pages_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kv_append_quantized_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
    slots_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_cos_token,
    stride_sin_token,
    stride_kp_page,
    stride_kp_slot,
    stride_kp_head,
    stride_vp_page,
    stride_vp_slot,
    stride_vp_head,
    stride_ks_page,
    stride_ks_slot,
    stride_ks_head,
    stride_vs_page,
    stride_vs_slot,
    stride_vs_head,
    FORMAT: tl.constexpr,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTATED: tl.constexpr,
    WK: tl.constexpr,
    WV: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_WK: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    LEAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid and out as in `rotary_kv_append_kernel`; pages and scales as in `kv_append_quantized_kernel`."""
    let_next_start(PDL)
    wait_for_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    cos = cos_ptr + token * stride_cos_token + tl.zeros([1, 1], tl.int32)
    sin = sin_ptr + token * stride_sin_token + tl.zeros([1, 1], tl.int32)
    if block < query_blocks:
        _rotate_queries(
            q_ptr, cos, sin, out_ptr, token, block, stride_q_token, stride_q_head,
            HEADS, D, ROTATED, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token)
        if slot >= 0:  # else padding
            page = slot // PAGE_SIZE
            offset = slot % PAGE_SIZE
            heads = (block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            live = heads < KV_HEADS
            channel, held = channels_of(live, PLANES, D, WK, BLOCK_WK)
            k_row = k_ptr + token * stride_k_token + heads[:, None, None] * stride_k_head
            x = tl.load(k_row + channel, mask=held, other=0.0).to(tl.float32)
            # The words scatter a head's channels, so each fetches the one that it is rotated with.
            turned = channel < ROTATED
            if INTERLEAVED:
                other_channel = channel ^ 1
                sign = tl.where(channel % 2 == 0, -1.0, 1.0)
            else:
                first = channel < ROTATED // 2
                other_channel = tl.where(first, channel + ROTATED // 2, channel - ROTATED // 2)
                sign = tl.where(first, -1.0, 1.0)
            other = tl.load(k_row + other_channel, mask=held & turned, other=0.0).to(tl.float32)
            c = tl.load(cos_ptr + token * stride_cos_token + channel, mask=turned, other=1.0).to(tl.float32)
            s = tl.load(sin_ptr + token * stride_sin_token + channel, mask=turned, other=0.0).to(tl.float32)
            x = (x * c + sign * other * s).to(k_ptr.dtype.element_ty).to(tl.float32)
            store_rows(
                x, held, k_pages_ptr + page * stride_kp_page + offset * stride_kp_slot,
                k_scales_ptr + page * stride_ks_page + offset * stride_ks_slot,
                heads, stride_kp_head, stride_ks_head, live, FORMAT, PLANES, WK, BLOCK_WK, LEAST,
            )  # fmt: skip
            append_rows(
                v_ptr + token * stride_v_token,
                v_pages_ptr + page * stride_vp_page + offset * stride_vp_slot,
                v_scales_ptr + page * stride_vs_page + offset * stride_vs_slot,
                heads, stride_v_head, stride_vp_head, stride_vs_head, live,
                FORMAT, PLANES, DV, WV, BLOCK_WV, LEAST,
            )  # fmt: skip


def rotary_kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::rotary_kv_append`."""
    check_rotary_append(q, k, v, cos, sin)
    check_plain_pages(k, v, k_pages, v_pages)
    check_channels("rotary_kv_append", k_pages, v_pages)
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    if not ONE_LAUNCH:
        q, k = _rotate(q, k, cos, sin, interleaved)
        kv_append(k, v, k_pages, v_pages, slots)
        return q
    q, k, v, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, cos, sin))
    grid, shape = _blocks(q, k, v, cos, interleaved)
    with on_device(q):
        rotary_kv_append_kernel[grid](
            q, k, v, cos, sin, out, k_pages, v_pages, slots,
            *_strides(q, k, v), cos.stride(0), sin.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
            PAGE_SIZE=k_pages.shape[1], BLOCK_DV=next_power_of_2(v.shape[2]), **shape,
            num_warps=4, **early_start(q.device),
        )  # fmt: skip
    return out


def rotary_kv_append_quantized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,
    format: str,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::rotary_kv_append_quantized`."""
    check_rotary_append(q, k, v, cos, sin)
    check_append(k, v, k_pages, v_pages, k_scales, v_scales, format)
    check_channels("rotary_kv_append", k_pages, v_pages)
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    if not ONE_LAUNCH:
        q, k = _rotate(q, k, cos, sin, interleaved)
        kv_append_quantized(k, v, k_pages, v_pages, k_scales, v_scales, slots, format)
        return q
    q, k, v, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, cos, sin))
    chosen = kv_format(format)
    wk, wv = k_pages.shape[3], v_pages.shape[3]
    k_words, v_words = scale_words(k_scales), scale_words(v_scales)
    grid, shape = _blocks(q, k, v, cos, interleaved)
    with on_device(q):
        rotary_kv_append_quantized_kernel[grid](
            q, k, v, cos, sin, out, k_pages, v_pages, k_words, v_words, slots,
            *_strides(q, k, v), cos.stride(0), sin.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
            *k_words.stride()[:3], *v_words.stride()[:3],
            FORMAT=format, PLANES=chosen.planes, WK=wk, WV=wv,
            BLOCK_WK=next_power_of_2(wk), BLOCK_WV=next_power_of_2(wv), LEAST=smallest_scale(format),
            PAGE_SIZE=k_pages.shape[1], **shape, num_warps=4, **early_start(q.device),
        )  # fmt: skip
    return out


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q (contiguous) and k rotated by a kernel each."""
    turn = (cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    return rotary(q, *turn).contiguous(), rotary(k, *turn)


def _blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, interleaved: bool
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid, and the constants that both kernels share."""
    tokens, heads, head_dim = q.shape
    kv_heads, rotated = k.shape[1], cos.shape[1]
    widest = next_power_of_2(max(head_dim, v.shape[2]))
    block_heads = min(next_power_of_2(max(heads, kv_heads)), max(1, _TILE // widest))
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "DV": v.shape[2], "ROTATED": rotated,
        "BLOCK_HEADS": block_heads, "BLOCK_HALF": next_power_of_2(rotated // 2),
        "BLOCK_REST": next_power_of_2(head_dim - rotated), "INTERLEAVED": interleaved,
    }  # fmt: skip
    return (tokens, -(-heads // block_heads) + -(-kv_heads // block_heads)), shape


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in t.stride()[:2])
