"""Write the keys and values of this step into their slots of the paged cache, in place."""

from __future__ import annotations

import torch

from qcompiler.kernels.library import register_op


def _reference(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    page_size = k_pages.shape[1]
    kept = slots >= 0
    if not bool(kept.all()):
        k, v, slots = k[kept], v[kept], slots[kept]
    place = (slots // page_size, slots % page_size)
    # Indexed by page and offset, not through a flattened view: flattening a strided cache would copy it.
    k_pages.index_put_(place, k.to(k_pages.dtype))
    v_pages.index_put_(place, v.to(v_pages.dtype))


def _fake(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    return None


kv_append = register_op(
    "kv_append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.kv_append:kv_append",
)
