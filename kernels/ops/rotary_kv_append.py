"""Rotary embedding of this step's queries and keys, and the append of its keys and values, at once.

What `rotary` (q), `rotary` (k) and `kv_append` or `kv_append_quantized` compute
one after the other: the rotated keys are rounded to k's dtype before they are
stored or quantized. cos and sin are laid out as `rotary` takes them.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op, registered_ops
from qcompiler.kernels.ops.kv_append_quantized import check_append


def check_rotary_append(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Refuse tensors whose shapes do not fit together; shapes only, so it never waits for a device.

    Raises:
        InvalidInputError: Names what does not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise InvalidInputError(
            f"rotary_kv_append: q {list(q.shape)} and k {list(k.shape)} are not [tokens, heads, head_dim] "
            "of the same tokens and channels"
        )
    if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise InvalidInputError(
            f"rotary_kv_append: v {list(v.shape)} is not [tokens, heads, channels] beside k {list(k.shape)}"
        )
    rotated = cos.shape[-1]
    if tuple(cos.shape) != (q.shape[0], rotated) or cos.shape != sin.shape:
        raise InvalidInputError(
            f"rotary_kv_append: cos {list(cos.shape)} and sin {list(sin.shape)} are not [tokens, rotated "
            f"channels] for {q.shape[0]} tokens"
        )
    if rotated % 2 or rotated > q.shape[2]:
        raise InvalidInputError(
            f"rotary_kv_append: a table of {rotated} columns cannot rotate {q.shape[2]} channels",
            hint="The number of rotated channels must be even and at most the head dimension.",
        )


def check_plain_pages(k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """Refuse pages that do not hold heads of k and v.

    Raises:
        InvalidInputError: Names the pages.
    """
    for name, rows, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if pages.dim() != 4 or pages.shape[2:] != rows.shape[1:]:
            raise InvalidInputError(
                f"rotary_kv_append: {name}_pages are {list(pages.shape)}, not [pages, page_size, "
                f"{rows.shape[1]}, {rows.shape[2]}]"
            )


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return registered_ops()["rotary"].reference(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)


def _reference(
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
    check_rotary_append(q, k, v, cos, sin)
    check_plain_pages(k, v, k_pages, v_pages)
    append = registered_ops()["kv_append"].reference
    append(_rotated(k, cos, sin, interleaved), v, k_pages, v_pages, slots)
    return _rotated(q, cos, sin, interleaved).contiguous()


def _fake(
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
    check_rotary_append(q, k, v, cos, sin)
    check_plain_pages(k, v, k_pages, v_pages)
    return q.new_empty(q.shape)


def _reference_quantized(
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
    check_rotary_append(q, k, v, cos, sin)
    append = registered_ops()["kv_append_quantized"].reference
    append(_rotated(k, cos, sin, interleaved), v, k_pages, v_pages, k_scales, v_scales, slots, format)
    return _rotated(q, cos, sin, interleaved).contiguous()


def _fake_quantized(
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
    check_rotary_append(q, k, v, cos, sin)
    check_append(k, v, k_pages, v_pages, k_scales, v_scales, format)
    return q.new_empty(q.shape)


rotary_kv_append = register_op(
    "rotary_kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_pages, "
    "Tensor(b!) v_pages, Tensor slots, bool interleaved) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.rotary_kv_append:rotary_kv_append",
)
rotary_kv_append_quantized = register_op(
    "rotary_kv_append_quantized(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) k_scales, Tensor(d!) v_scales, Tensor slots, "
    "bool interleaved, str format) -> Tensor",
    reference=_reference_quantized,
    fake=_fake_quantized,
    cuda="qcompiler.kernels.triton.attention.rotary_kv_append:rotary_kv_append_quantized",
)
