"""`rotary_kv_append`: what `rotary` twice and an append give, for plain and quantized caches."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.kv_cache import KV_FORMATS, kv_format

_ops = torch.ops.qcompiler
PAGES, PAGE_SIZE, HEADS, KV_HEADS = 5, 4, 6, 3
SLOTS = (3, 19, -1, 0, 7)
# (channels, rotated channels, channels of values): whole and partial heads, powers of two or not
WIDTHS = [(16, 16, 16), (24, 24, 10), (80, 32, 16), (20, 6, 20)]


def case(dim=24, rotated=24, channels=10, slots=SLOTS):
    """q, k and v as slices of one projection, cos and sin [tokens, rotated], slots."""
    g = torch.Generator().manual_seed(dim + rotated)
    sizes = (HEADS * dim, KV_HEADS * dim, KV_HEADS * channels)
    fused = torch.randn(len(slots), sum(sizes), generator=g)
    q, k, v = (
        part.unflatten(1, (-1, n))
        for part, n in zip(fused.split(sizes, 1), (dim, dim, channels), strict=True)
    )
    cos, sin = torch.randn(2, len(slots), rotated, generator=g)
    return q, k, v, cos, sin, torch.tensor(slots, dtype=torch.int64)


def plain_pages(dim, channels, dtype=torch.float32, device="cpu"):
    """Pages full of NaN, strided as slices of one buffer that holds keys and values side by side."""
    buffer = torch.full((PAGES, PAGE_SIZE, KV_HEADS, dim + channels), torch.nan, dtype=dtype, device=device)
    return [buffer[..., :dim], buffer[..., dim:]]


def quantized_pages(name, dim, channels, device="cpu"):
    """Pages and scales that hold a known pattern, one head after the other."""
    chosen = kv_format(name)
    rows = [
        (KV_HEADS, chosen.words(dim)),
        (KV_HEADS, chosen.words(channels)),
        *[chosen.scale_row(KV_HEADS)] * 2,
    ]
    dtypes = [torch.int16, torch.int16, chosen.scale_dtype, chosen.scale_dtype]
    pages = [
        torch.full((PAGES, PAGE_SIZE, *row), 77, dtype=dtype, device=device)
        for row, dtype in zip(rows, dtypes, strict=True)
    ]
    return [p.transpose(1, 2).contiguous().transpose(1, 2) for p in pages]


def rotated_alone(x, cos, sin, interleaved):
    """`rotary` of [tokens, heads, channels]."""
    heads_first = x.transpose(0, 1).unsqueeze(0)
    return _ops.rotary(heads_first, cos[None], sin[None], interleaved)[0].transpose(0, 1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated", "channels"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_the_three_ops(dim, rotated, channels, interleaved, dtype):
    *floats, slots = case(dim, rotated, channels)
    q, k, v, cos, sin = (t.to(dtype) for t in floats)
    got, wanted = plain_pages(dim, channels, dtype), plain_pages(dim, channels, dtype)
    out = _ops.rotary_kv_append(q, k, v, cos, sin, *got, slots, interleaved)
    assert torch.equal(out, rotated_alone(q, cos, sin, interleaved))
    _ops.kv_append(rotated_alone(k, cos, sin, interleaved), v, *wanted, slots)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("name", KV_FORMATS)
def test_reference_over_a_quantized_cache_is_the_three_ops(name):
    q, k, v, cos, sin, slots = case()
    got, wanted = quantized_pages(name, 24, 10), quantized_pages(name, 24, 10)
    out = _ops.rotary_kv_append_quantized(q, k, v, cos, sin, *got, slots, False, name)
    assert torch.equal(out, rotated_alone(q, cos, sin, False))
    _ops.kv_append_quantized(rotated_alone(k, cos, sin, False), v, *wanted, slots, name)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))


def test_opcheck():
    q, k, v, cos, sin, slots = case()
    pages = [torch.zeros(PAGES, PAGE_SIZE, KV_HEADS, n) for n in (24, 10)]
    torch.library.opcheck(_ops.rotary_kv_append.default, (q, k, v, cos, sin, *pages, slots, True))
    for name in KV_FORMATS:
        arguments = (q, k, v, cos, sin, *quantized_pages(name, 24, 10), slots, False, name)
        torch.library.opcheck(_ops.rotary_kv_append_quantized.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, cos: (q[:2], k, cos), "of the same tokens"),
        (lambda q, k, cos: (q, k, cos[:, :5]), "are not \\[tokens, rotated"),
        (lambda q, k, cos: (q, k[..., :8], cos), "of the same tokens and channels"),
        (lambda q, k, cos: (q[..., :8], k[..., :8], cos), "24 columns cannot rotate 8"),
        (lambda q, k, cos: (q, k[:, :2], cos), "v .* is not"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    q, k, v, cos, sin, slots = case()
    q, k, cos = change(q, k, cos)
    with pytest.raises(InvalidInputError, match=message):
        _ops.rotary_kv_append(q, k, v, cos, sin, *plain_pages(24, 10), slots, False)


one_launch_or_three = pytest.mark.parametrize("one", [True, False], ids=["one launch", "three"])


def test_pages_of_other_heads_are_refused():
    q, k, v, cos, sin, slots = case()
    with pytest.raises(InvalidInputError, match=r"v_pages are .* not \[pages, page_size, 3, 10\]"):
        _ops.rotary_kv_append(q, k, v, cos, sin, *plain_pages(24, 9), slots, False)


@on_triton
@one_launch_or_three
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated", "channels"), WIDTHS)
def test_kernel_agrees(dim, rotated, channels, interleaved, one, target, monkeypatch):
    from qcompiler.kernels.triton.attention import rotary_kv_append as launcher

    monkeypatch.setattr(launcher, "ONE_LAUNCH", one)
    rotary_kv_append = launcher.rotary_kv_append

    device, dtype = target
    arguments = to_target(target, *case(dim, rotated, channels))
    wanted_pages = plain_pages(dim, channels, dtype)
    *floats, slots = (t.cpu() for t in arguments)
    wanted = _ops.rotary_kv_append(*floats, *wanted_pages, slots, interleaved)
    pages = plain_pages(dim, channels, dtype, device)
    out = rotary_kv_append(*map(poisoned, arguments[:-1]), *pages, arguments[-1], interleaved)
    assert_close(out, wanted)
    for mine, theirs in zip(pages, wanted_pages, strict=True):
        assert torch.equal(mine.isnan().cpu(), theirs.isnan())
        assert_close(mine.nan_to_num(0.0), theirs.nan_to_num(0.0))


@on_triton
@one_launch_or_three
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize(("dim", "rotated", "channels"), [(24, 24, 10), (80, 32, 16)])
def test_kernel_writes_the_codes_of_what_it_rotates(
    name, dim, rotated, channels, interleaved, one, target, monkeypatch
):
    """Held against codes of keys rotated in float32 and rounded, as the kernel does."""
    from qcompiler.kernels.triton.attention import rotary_kv_append as launcher

    monkeypatch.setattr(launcher, "ONE_LAUNCH", one)
    rotary_kv_append_quantized = launcher.rotary_kv_append_quantized

    device, _ = target
    q, k, v, cos, sin, slots = to_target(target, *case(dim, rotated, channels))
    pages = quantized_pages(name, dim, channels, device)
    arguments = map(poisoned, (q, k, v, cos, sin))
    out = rotary_kv_append_quantized(*arguments, *pages, slots, interleaved, name)
    assert_close(out, rotated_alone(*(t.cpu() for t in (q, cos, sin)), interleaved))
    keys = rotated_alone(*(t.cpu().float() for t in (k, cos, sin)), interleaved).to(k.dtype)
    kept = [slot for slot in SLOTS if slot >= 0]
    live = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    chosen = kv_format(name)
    for rows, words, scales in ((keys, pages[0], pages[2]), (v.cpu(), pages[1], pages[3])):
        flat_words, flat_scales = (p.cpu().flatten(0, 1) for p in (words, scales))
        got = chosen.dequantize(flat_words[kept], flat_scales[kept], rows.shape[-1])
        wanted = chosen.dequantize(*chosen.quantize(rows[live]), rows.shape[-1])
        # A product that rounds the other way may move a code by one step.
        step = {"int8": 2 / 127, "int4": 2 / 15, "fp8": 1 / 8}[name]
        assert bool(((got - wanted).abs() <= step * rows[live].float().abs().amax(-1, keepdim=True)).all())
        assert ((got - wanted).abs() > 1e-3).float().mean() < 0.02
        untouched = [slot for slot in range(PAGES * PAGE_SIZE) if slot not in kept]
        assert (flat_words[untouched] == 77).all()
        assert (flat_scales[untouched] == 77).all()


@on_triton
def test_no_tokens_and_only_padding(target):
    from qcompiler.kernels.triton.attention.rotary_kv_append import rotary_kv_append

    for slots in ((), (-1, -1)):
        arguments = to_target(target, *case(slots=slots))
        pages = plain_pages(24, 10, target[1], target[0])
        assert rotary_kv_append(*arguments[:-1], *pages, arguments[-1], False).shape == (
            len(slots),
            HEADS,
            24,
        )
        assert all(page.isnan().all() for page in pages)
