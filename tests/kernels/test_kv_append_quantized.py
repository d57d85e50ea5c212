"""`kv_append_quantized`: rows land quantized in their slots, padding is dropped, nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.kv_cache import KV_FORMATS, kv_format

OP = torch.ops.qcompiler.kv_append_quantized.default
PAGES, PAGE_SIZE, HEADS, D, DV = 5, 4, 3, 24, 10
SLOTS = (3, 19, -1, 0, 7, -1, 5)
UNTOUCHED = 77


def case(slots=SLOTS):
    g = torch.Generator().manual_seed(0)
    k = torch.randn(len(slots), HEADS, D, generator=g)
    v = torch.randn(len(slots), HEADS, DV, generator=g)
    if len(slots) > 3:
        k[1] *= 100.0
        v[3, 1] = 0.0
    return k, v, torch.tensor(slots, dtype=torch.int64)


def empty_pages(name, device="cpu", by_head=False):
    """Pages and scales that hold a known pattern."""
    chosen = kv_format(name)
    shapes = [(HEADS, chosen.words(D)), (HEADS, chosen.words(DV)), *[chosen.scale_row(HEADS)] * 2]
    dtypes = [torch.int16, torch.int16, chosen.scale_dtype, chosen.scale_dtype]
    pages = [
        torch.full((PAGES, PAGE_SIZE, *row), UNTOUCHED, dtype=dtype, device=device)
        for row, dtype in zip(shapes, dtypes, strict=True)
    ]
    return [p.transpose(1, 2).contiguous().transpose(1, 2) for p in pages] if by_head else pages


def check(name, k, v, pages, slots):
    chosen = kv_format(name)
    slots = slots.tolist()
    untouched = [slot for slot in range(PAGES * PAGE_SIZE) if slot not in slots]
    kept = [i for i, slot in enumerate(slots) if slot >= 0]
    for rows, words, scales in ((k, pages[0], pages[2]), (v, pages[1], pages[3])):
        flat_words, flat_scales = (p.cpu().flatten(0, 1) for p in (words, scales))
        assert (flat_words[untouched] == UNTOUCHED).all()
        assert (flat_scales[untouched] == UNTOUCHED).all()
        wanted_words, wanted_scales = chosen.quantize(rows[kept])
        places = [slots[i] for i in kept]
        assert torch.equal(flat_words[places], wanted_words)
        assert torch.equal(flat_scales[places], wanted_scales)


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("slots", [SLOTS, (-1, -1), (2,), ()])
def test_reference_writes_the_slots_and_nothing_else(slots, name):
    k, v, slots = case(slots)
    pages = empty_pages(name)
    assert OP(k, v, *pages, slots, name) is None
    check(name, k, v, pages, slots)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_opcheck(name):
    k, v, slots = case()
    torch.library.opcheck(OP, (k, v, *empty_pages(name), slots, name))


@on_triton
@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("slots", [SLOTS, (-1, -1), (2,), ()])
def test_kernel_writes_what_the_reference_does(slots, name, target):
    from qcompiler.kernels.triton.attention.kv_append_quantized import kv_append_quantized

    device, _ = target
    k, v, slots = to_target(target, *case(slots))
    pages = empty_pages(name, device, by_head=True)
    kv_append_quantized(poisoned(k), poisoned(v), *pages, slots, name)
    check(name, k.cpu(), v.cpu(), pages, slots.cpu())


@on_triton
@pytest.mark.parametrize("name", KV_FORMATS)
def test_kernel_rounds_every_kind_of_number_as_the_reference_does(name, target):
    from qcompiler.kernels.triton.attention.kv_append_quantized import kv_append_quantized

    device, _ = target
    steps = torch.cat([torch.linspace(-1, 1, 280), torch.logspace(-9, 0, 80, base=2)])
    k = torch.cat([steps, -steps]).reshape(10, HEADS, D)
    k, v, slots = to_target(target, k, k[..., :DV], torch.arange(k.shape[0]))
    pages = empty_pages(name, device)
    kv_append_quantized(k, v, *pages, slots, name)
    check(name, k.cpu(), v.cpu(), pages, slots.cpu())


@on_triton
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", KV_FORMATS)
def test_kernel_hands_on_what_is_not_finite(name, poison, target):
    from qcompiler.kernels.triton.attention.kv_append_quantized import kv_append_quantized

    device, _ = target
    k, v, slots = to_target(target, *case((2,)))
    k[0, 1, 5] = poison
    pages = empty_pages(name, device)
    kv_append_quantized(k, v, *pages, slots, name)
    scales = pages[2].cpu().flatten(0, 1)[2].reshape(HEADS, -1)[:, 0]
    assert scales.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__(0, p[0][..., :-8]), "k_pages"),
        (lambda p: p.__setitem__(1, p[1].to(torch.int8)), "v_pages"),
        (lambda p: p.__setitem__(2, p[2][:-1]), "k_scales"),
        (lambda p: p.__setitem__(3, p[3].double()), "v_scales"),
    ],
)
def test_pages_and_scales_of_another_format_are_refused(change, message):
    k, v, slots = case()
    pages = empty_pages("int8")
    change(pages)
    with pytest.raises(InvalidInputError, match=message):
        OP(k, v, *pages, slots, "int8")
