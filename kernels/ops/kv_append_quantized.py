"""Quantize the keys and values of this step and write them into their slots of the paged cache, in place."""

from __future__ import annotations

import torch

from qcompiler.kernels.formats.kv_cache import check_pages, kv_format
from qcompiler.kernels.library import register_op


def check_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    format_name: str,
) -> None:
    """Raise `InvalidInputError` unless pages and scales are those that the format gives k and v."""
    chosen = kv_format(format_name)
    check_pages(chosen, k_pages, k_scales, k.shape[1], k.shape[2], "k")
    check_pages(chosen, v_pages, v_scales, v.shape[1], v.shape[2], "v")


def _reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
    format: str,
) -> None:
    check_append(k, v, k_pages, v_pages, k_scales, v_scales, format)
    page_size = k_pages.shape[1]
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    place = (slots // page_size, slots % page_size)
    for rows, pages, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        words, scale = kv_format(format).quantize(rows)
        pages.index_put_(place, words)
        scales.index_put_(place, scale)


def _fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
    format: str,
) -> None:
    check_append(k, v, k_pages, v_pages, k_scales, v_scales, format)


kv_append_quantized = register_op(
    "kv_append_quantized(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) k_scales, "
    "Tensor(d!) v_scales, Tensor slots, str format) -> ()",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.kv_append_quantized:kv_append_quantized",
)
