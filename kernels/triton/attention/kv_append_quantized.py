"""Quantize new keys and values and scatter them into the paged cache, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.formats.kv_cache import kv_format, smallest_scale
from qcompiler.kernels.ops.kv_append_quantized import check_append
from qcompiler.kernels.triton.attention.kv_codes import scale_words
from qcompiler.kernels.triton.attention.launch import checked_pages
from qcompiler.kernels.triton.launch import (
    early_start,
    let_next_start,
    next_power_of_2,
    on_device,
    wait_for_earlier,
)

_MAX_BLOCK = 4096  # channels that a program holds


@triton.jit
def _e4m3_bits(x):
    """Codes of float32 in [−448, 448], rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    size = bits & 0x7FFFFFFF
    # Normal numbers: 20 bits of the mantissa go, the exponent's bias falls from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9; adding 2^14 leaves just those in the mantissa of a float32.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return sign | tl.where(size < 0x3C800000, small, normal)


@triton.jit
def append_rows(
    source,
    words_ptr,
    scales_ptr,
    heads,
    stride_head,
    stride_words_head,
    stride_scales_head,
    live,
    FORMAT: tl.constexpr,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Quantize and store rows of the heads [H] of one token, as [H, PLANES, BLOCK_W]."""
    channel, held = channels_of(live, PLANES, D, W, BLOCK_W)
    x = tl.load(source + heads[:, None, None] * stride_head + channel, mask=held, other=0.0).to(tl.float32)
    store_rows(
        x, held, words_ptr, scales_ptr, heads, stride_words_head, stride_scales_head, live,
        FORMAT, PLANES, W, BLOCK_W, LEAST,
    )  # fmt: skip


@triton.jit
def channels_of(live, PLANES: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Channels [1, PLANES, BLOCK_W] as the words hold them, and which exist, [H, PLANES, BLOCK_W]."""
    e = tl.arange(0, BLOCK_W)[None, None, :]
    channel = tl.arange(0, PLANES)[None, :, None] * W + e
    return channel, live[:, None, None] & (e < W) & (channel < D)


@triton.jit
def store_rows(
    x,
    held,
    words_ptr,
    scales_ptr,
    heads,
    stride_words_head,
    stride_scales_head,
    live,
    FORMAT: tl.constexpr,
    PLANES: tl.constexpr,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Quantize and store x float32 [H, PLANES, BLOCK_W], of which the `held` channels exist."""
    BITS: tl.constexpr = 16 // PLANES
    j = tl.arange(0, PLANES)[None, :, None]
    # NaN for a row that holds NaN or infinity, which a maximum would pass over; its scale hands it on.
    poison = tl.sum(tl.sum(x * 0.0, 2), 1)
    if FORMAT == "int4":
        low = tl.min(tl.min(tl.where(held, x, float("inf")), 2), 1)
        high = tl.max(tl.max(tl.where(held, x, float("-inf")), 2), 1)
        low_half = tl.where(live, low, 0.0).to(tl.float16)
        low = low_half.to(tl.float32)
        high = tl.where(live, high, 0.0)
        scale_half = tl.div_rn(high - low, 15.0).to(tl.float16)
        scale = tl.maximum(scale_half.to(tl.float32), LEAST)
        inverse = tl.div_rn(1.0, scale)
        scaled = (x - low[:, None, None]) * inverse[:, None, None]
        codes = tl.minimum(tl.maximum(tl.floor(scaled + 0.5), 0.0), 15.0).to(tl.int32)
        scale_bits = (scale + poison).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        stored = scale_bits | (low_half.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        TOP: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
        scale = tl.maximum(tl.div_rn(tl.max(tl.max(tl.abs(x), 2), 1), TOP), LEAST)
        inverse = tl.div_rn(1.0, scale)
        scaled = tl.minimum(tl.maximum(x * inverse[:, None, None], -TOP), TOP)
        if FORMAT == "int8":
            codes = tl.floor(scaled + 0.5).to(tl.int32) & 255
        else:
            codes = _e4m3_bits(scaled)
        stored = scale + poison
    codes = tl.where(held, codes, 0)
    words = tl.sum(codes << (BITS * j), 1)
    tl.store(scales_ptr + heads * stride_scales_head, stored, mask=live)
    word = tl.arange(0, BLOCK_W)[None, :]
    at = words_ptr + heads[:, None] * stride_words_head + word
    tl.store(at, words.to(tl.int16), mask=live[:, None] & (word < W))


@triton.jit
def kv_append_quantized_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    k_scales_ptr,
    v_scales_ptr,
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
    stride_ks_page,
    stride_ks_slot,
    stride_ks_head,
    stride_vs_page,
    stride_vs_slot,
    stride_vs_head,
    FORMAT: tl.constexpr,
    PLANES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WK: tl.constexpr,
    WV: tl.constexpr,
    BLOCK_WK: tl.constexpr,
    BLOCK_WV: tl.constexpr,
    LEAST: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tokens, heads / BLOCK_H)."""
    let_next_start(PDL)
    wait_for_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:  # padding
        return
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live = heads < HEADS
    append_rows(
        k_ptr + token * stride_k_token, k_pages_ptr + page * stride_kp_page + offset * stride_kp_slot,
        k_scales_ptr + page * stride_ks_page + offset * stride_ks_slot,
        heads, stride_k_head, stride_kp_head, stride_ks_head, live, FORMAT, PLANES, D, WK, BLOCK_WK, LEAST,
    )  # fmt: skip
    append_rows(
        v_ptr + token * stride_v_token, v_pages_ptr + page * stride_vp_page + offset * stride_vp_slot,
        v_scales_ptr + page * stride_vs_page + offset * stride_vs_slot,
        heads, stride_v_head, stride_vp_head, stride_vs_head, live, FORMAT, PLANES, DV, WV, BLOCK_WV, LEAST,
    )  # fmt: skip


def kv_append_quantized(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
    format: str,
) -> None:
    """CUDA provider of `qcompiler::kv_append_quantized`."""
    check_append(k, v, k_pages, v_pages, k_scales, v_scales, format)
    k_pages, v_pages = checked_pages(k_pages, "k_pages"), checked_pages(v_pages, "v_pages")
    tokens, heads, head_dim = k.shape
    if tokens == 0:
        return
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    chosen = kv_format(format)
    wk, wv = k_pages.shape[3], v_pages.shape[3]
    block_wk, block_wv = next_power_of_2(wk), next_power_of_2(wv)
    block_h = min(next_power_of_2(heads), max(1, _MAX_BLOCK // (chosen.planes * max(block_wk, block_wv))))
    k_words, v_words = scale_words(k_scales), scale_words(v_scales)
    with on_device(k):
        kv_append_quantized_kernel[(tokens, -(-heads // block_h))](
            k, v, k_pages, v_pages, k_words, v_words, slots,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *k_pages.stride()[:3], *v_pages.stride()[:3], *k_words.stride()[:3], *v_words.stride()[:3],
            FORMAT=format, PLANES=chosen.planes, HEADS=heads, BLOCK_H=block_h, D=head_dim, DV=v.shape[2],
            WK=wk, WV=wv, BLOCK_WK=block_wk, BLOCK_WV=block_wv, LEAST=smallest_scale(format),
            PAGE_SIZE=k_pages.shape[1], num_warps=4, **early_start(k.device),
        )  # fmt: skip
