"""Scatter new keys and values into the paged cache, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.triton.launch import (
    early_start,
    let_next_start,
    next_power_of_2,
    on_device,
    wait_for_earlier,
)

_MAX_BLOCK = 1024


@triton.jit
def _copy_heads(
    source,
    target,
    piece,
    stride_source,
    stride_target,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = piece * BLOCK + tl.arange(0, BLOCK)
    mask = element < HEADS * D
    x = tl.load(source + element // D * stride_source + element % D, mask=mask)
    tl.store(target + element // D * stride_target + element % D, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def kv_append_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_kp_page,
    stride_kp_slot,
    stride_kp_head,
    stride_vp_page,
    stride_vp_slot,
    stride_vp_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tokens, heads · max(D, DV) / BLOCK)."""
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    wait_for_earlier(PDL)
    slot = tl.load(slots_ptr + token)
    if slot < 0:  # padding
        return
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    k_target = k_pages_ptr + page * stride_kp_page + offset * stride_kp_slot
    v_target = v_pages_ptr + page * stride_vp_page + offset * stride_vp_slot
    piece = tl.program_id(1)
    _copy_heads(
        k_ptr + token * stride_k_token, k_target, piece, stride_k_head, stride_kp_head, HEADS, D, BLOCK
    )
    _copy_heads(
        v_ptr + token * stride_v_token, v_target, piece, stride_v_head, stride_vp_head, HEADS, DV, BLOCK
    )


def check_channels(op: str, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Refuse pages whose channels are not neighbours.

    Raises:
        InvalidInputError: Names the op.
    """
    if k_pages.stride(-1) != 1 or v_pages.stride(-1) != 1:
        raise InvalidInputError(
            f"{op}: the channels of the pages are not contiguous",
            hint="Lay the cache out as [pages, page_size, heads, head_dim].",
        )


def kv_append(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """CUDA provider of `qcompiler::kv_append`."""
    check_channels("kv_append", k_pages, v_pages)
    tokens, heads, head_dim = k.shape
    channels = v.shape[2]
    if tokens == 0:
        return
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    widest = heads * max(head_dim, channels)
    block = min(next_power_of_2(widest), _MAX_BLOCK)
    with on_device(k):
        kv_append_kernel[(tokens, -(-widest // block))](
            k, v, k_pages, v_pages, slots,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *k_pages.stride()[:3], *v_pages.stride()[:3],
            HEADS=heads, D=head_dim, DV=channels, PAGE_SIZE=k_pages.shape[1], BLOCK=block, num_warps=4,
            **early_start(k.device),
        )  # fmt: skip
