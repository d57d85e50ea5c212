"""Formats of the KV cache: what codes stand for, how far they are off, and what they take."""

from __future__ import annotations

import pytest
import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.kv_cache import KV_FORMATS, kv_format
from qcompiler.kernels.kv_bits import kv_format_of_bits

DIMS = [1, 8, 24, 40, 64, 80, 128]


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", KV_FORMATS)
def test_no_value_is_further_off_than_half_a_step(name, dim):
    chosen = kv_format(name)
    x = values(5, 3, dim) * torch.tensor([0.01, 1.0, 300.0])[None, :, None]
    words, scales = chosen.quantize(x)
    back = chosen.dequantize(words, scales, dim)
    span = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    size = x.abs().amax(-1, keepdim=True)
    # the scales of int4 are float16, which moves the ends of the range by 2^-11 of their size
    bound = {
        "int8": size / 254 * 1.001,
        "int4": span / 30 + (span + size) * 2.0**-11 + 2.0**-24,
        "fp8": torch.maximum(x.abs() * 2.0**-4, size / 448 * 2.0**-10) * 1.001,
    }[name]
    assert ((back - x).abs() <= bound).all()


@pytest.mark.parametrize("name", KV_FORMATS)
def test_rows_are_aligned_and_the_bytes_are_those_accounted_for(name):
    chosen = kv_format(name)
    for dim in DIMS:
        words, scales = chosen.quantize(values(7, 2, dim))
        assert words.shape == (7, 2, chosen.words(dim))
        assert words.shape[-1] % 8 == 0
        assert scales.shape == (7, *chosen.scale_row(2))
        stored = words.nbytes + scales.nbytes
        assert stored * 8 == chosen.bits_per_value(dim) * 7 * 2 * dim
    assert kv_format("int8").bits_per_value(128) == 8.25
    assert kv_format("int4").bits_per_value(128) == 4.25


def test_planes_are_runs_of_channels():
    x = torch.arange(16.0).repeat(2)[None, None]  # codes 0 to 15, twice
    words, scales = kv_format("int4").quantize(x)
    assert scales.tolist() == [[[1.0, 0.0]]]
    planes = [(words.int() >> (4 * j)) & 15 for j in range(4)]
    assert torch.cat(planes, -1).flatten().tolist() == x.flatten().int().tolist()


@pytest.mark.parametrize("name", KV_FORMATS)
def test_rows_of_one_value_come_back(name):
    chosen = kv_format(name)
    for value in (0.0, 1.0, -3.0):
        x = torch.full((1, 1, 16), value)
        back = chosen.dequantize(*chosen.quantize(x), 16)
        torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", KV_FORMATS)
def test_what_is_not_finite_stays_so_and_harms_nobody_else(name, poison):
    chosen = kv_format(name)
    x = values(2, 2, 16)
    x[0, 0, 3] = poison
    back = chosen.dequantize(*chosen.quantize(x), 16)
    assert not back[0, 0].isfinite().any()
    assert back[0, 1].isfinite().all()
    assert back[1].isfinite().all()


def test_what_a_user_may_ask_for():
    assert [kv_format_of_bits(bits) for bits in (16, "8", 4, "fp8")] == [None, "int8", "int4", "fp8"]
    with pytest.raises(InvalidInputError, match="cannot have 3 bits"):
        kv_format_of_bits(3)
    with pytest.raises(InvalidInputError, match="'int2' is not a format"):
        kv_format("int2")
