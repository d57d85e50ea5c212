"""`kv_append`: rows land in their slots, padding is dropped, nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401

OP = torch.ops.qcompiler.kv_append.default
PAGES, PAGE_SIZE, HEADS, D, DV = 5, 4, 3, 24, 10


def case(slots=(3, 19, -1, 0, 7, -1, 5)):
    g = torch.Generator().manual_seed(0)
    k = torch.randn(len(slots), HEADS, D, generator=g)
    v = torch.randn(len(slots), HEADS, DV, generator=g)
    return k, v, torch.tensor(slots, dtype=torch.int64)


def empty_pages(dtype=torch.float32, device="cpu"):
    """Pages full of NaN, strided as slices of one buffer that holds keys and values side by side."""
    buffer = torch.full((PAGES, PAGE_SIZE, HEADS, D + DV), float("nan"), dtype=dtype, device=device)
    return buffer[..., :D], buffer[..., D:]


def check(k, v, k_pages, v_pages, slots):
    for rows, pages in ((k, k_pages), (v, v_pages)):
        flat = pages.reshape(PAGES * PAGE_SIZE, HEADS, -1)
        written = [slot for slot in slots.tolist() if slot >= 0]
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot >= 0:
                assert torch.equal(flat[slot], row)
        untouched = [slot for slot in range(PAGES * PAGE_SIZE) if slot not in written]
        assert flat[untouched].isnan().all()


@pytest.mark.parametrize("slots", [(3, 19, -1, 0, 7, -1, 5), (-1, -1), (2,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_writes_the_slots_and_nothing_else(slots, dtype):
    k, v, slots = case(slots)
    k, v = k.to(dtype), v.to(dtype)
    pages = empty_pages(dtype)
    assert OP(k, v, *pages, slots) is None
    check(k, v, *pages, slots)


def test_opcheck():
    k, v, slots = case()
    pages = torch.zeros(PAGES, PAGE_SIZE, HEADS, D), torch.zeros(PAGES, PAGE_SIZE, HEADS, DV)
    torch.library.opcheck(OP, (k, v, *pages, slots))


@on_triton
@pytest.mark.parametrize("slots", [(3, 19, -1, 0, 7, -1, 5), (-1, -1), (2,), ()])
def test_kernel_writes_the_slots_and_nothing_else(slots, target):
    from qcompiler.kernels.triton.attention.kv_append import kv_append

    device, dtype = target
    k, v, slots = to_target(target, *case(slots))
    pages = empty_pages(dtype, device)
    kv_append(poisoned(k), poisoned(v), *pages, slots)
    check(k.cpu(), v.cpu(), *(p.cpu() for p in pages), slots.cpu())


def test_what_was_appended_is_what_attention_reads():
    k, v, _ = case(tuple(range(8, 17)))
    k_pages, v_pages = (torch.full((PAGES, PAGE_SIZE, HEADS, n), float("nan")) for n in (D, DV))
    OP(k, v, k_pages, v_pages, torch.arange(8, 17))
    q = torch.randn(1, HEADS, D)
    table = torch.tensor([[2, 3, 4]], dtype=torch.int32)
    start, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    options = (0.2, True, 0, 0, 0.0, None)
    out = torch.ops.qcompiler.paged_attention(q, k_pages, v_pages, table, start, lengths, 1, *options)
    dense = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    assert_close(out, torch.ops.qcompiler.attention(*dense, *options)[0])
