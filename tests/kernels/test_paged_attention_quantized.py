"""`paged_attention_quantized`: what each sequence gets alone from the keys that its codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import on_triton, on_triton_wide
from paged_case import CASES, PagedCase
from quantized_case import quantized
from tolerances import assert_close as assert_close_as_stored

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.kv_cache import KV_FORMATS

OP = torch.ops.qcompiler.paged_attention_quantized.default
# Each way through the kernels: padded planes, windows and chunks, several head tiles, tiles within one page.
WAYS = [
    "mixed-with-padding", "decode-padded-graph", "decode-odd-group", "odd-dims", "window", "chunk-decode",
    "decode-one-long", "softcap-sinks", "softcap-sinks-decode", "full-window-decode",
]  # fmt: skip
OTHERS = [
    (fmt, n) for fmt in ("int8", "fp8") for n in ("mixed-with-padding", "decode-padded-rows", "odd-dims")
]
WIDE = [("int4", name) for name in WAYS] + OTHERS


def assert_close(actual, expected):
    # Weights times a value's scale are rounded to bfloat16, whose range they need, also for float16 queries.
    coarse = torch.bfloat16 if actual.dtype == torch.float16 and actual.is_cuda else None
    assert_close_as_stored(actual, expected, like=coarse)


@pytest.mark.parametrize(("fmt", "name"), [("int4", name) for name in CASES] + OTHERS)
def test_reference_gives_each_sequence_what_it_gets_alone(fmt, name):
    arguments, expected = quantized(CASES[name], fmt)
    assert_close(OP(*arguments), expected)


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("name", ["mixed-with-padding", "decode"])
def test_opcheck(name, fmt):
    arguments, _ = quantized(replace(CASES[name], padding_rows=0), fmt)
    finite = [a.nan_to_num() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    torch.library.opcheck(OP, tuple(finite))


def test_pages_that_are_not_of_the_format_are_refused():
    arguments, _ = quantized(CASES["decode"], "int8")
    with pytest.raises(InvalidInputError, match="k_scales are"):
        OP(*(("int4" if a == "int8" else a) if isinstance(a, str) else a for a in arguments))


@on_triton_wide
@pytest.mark.parametrize(("fmt", "name"), WIDE)
def test_kernel_gives_each_sequence_what_it_gets_alone(fmt, name, target):
    from qcompiler.kernels.triton.attention.launch_quantized import paged_attention_quantized

    device, dtype = target
    arguments, expected = quantized(CASES[name], fmt, dtype, device, by_head=True)
    assert_close(paged_attention_quantized(*arguments), expected)


@on_triton_wide
@pytest.mark.parametrize(("fmt", "name"), [("int4", "odd-dims"), ("int8", "window"), ("fp8", "prefill")])
def test_long_prefills_dequantize_first_and_get_the_same(fmt, name, target, monkeypatch):
    from qcompiler.kernels.triton.attention import launch_quantized as attention_quantized

    monkeypatch.setattr(attention_quantized, "DEQUANTIZE_QUERIES", 2)
    monkeypatch.setattr(attention_quantized, "prefill_quantized_kernel", None)  # is not what runs
    device, dtype = target
    arguments, expected = quantized(CASES[name], fmt, dtype, device, by_head=True)
    assert_close(attention_quantized.paged_attention_quantized(*arguments), expected)


@on_triton
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["softcap-sinks-decode", "window-decode"])
def test_decode_does_not_depend_on_the_number_of_splits(name, splits, target, monkeypatch):
    from qcompiler.kernels.triton.attention import launch_quantized as attention_quantized

    monkeypatch.setattr(attention_quantized, "decode_splits", lambda *_: splits)
    device, dtype = target
    arguments, expected = quantized(CASES[name], "int4", dtype, device)
    assert_close(attention_quantized.paged_attention_quantized(*arguments), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize("rows", [1, 200])  # 200: dequantized in the tiles
def test_head_dimensions_on_cuda(rows, fmt, dtype, dim, page_size):
    case = PagedCase(
        (700, 230, 300), (rows, rows, rows), heads=8, kv_heads=2, dim=dim, channels=dim, page_size=page_size,
        options={"scale": dim**-0.5},
    )  # fmt: skip
    arguments, expected = quantized(case, fmt, dtype, "cuda", by_head=True)
    assert_close(OP(*arguments), expected)
