"""The affine storage format: what goes in comes out, in exactly the bytes it claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec, get_format
from qcompiler.kernels.formats.affine import BITS, GROUP_SIZES, block_width, num_groups

SIZES = [(1, 1), (3, 7), (5, 33), (16, 64), (7, 100), (8, 256), (4, 768), (2, 1000), (3, 1536)]


def random_parts(spec: AffineSpec, n: int, k: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    zeros = torch.rand(n, groups, generator=generator) * (2**spec.bits - 1)
    return codes, scales.to(spec.scale_dtype), zeros.to(spec.zero_dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_round_trip_is_exact(bits, group_size, n, k):
    spec = AffineSpec(bits, group_size)
    codes, scales, zeros = random_parts(spec, n, k)
    tensors = AFFINE.pack(spec, codes, scales, zeros)
    back = AFFINE.unpack(spec, tensors, k)
    for wanted, found in zip((codes, scales, zeros), back, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    n=st.integers(1, 9),
    k=st.integers(1, 700),
)
@settings(max_examples=150, deadline=None)
def test_any_size_round_trips_in_the_bytes_it_claims(bits, group_size, dtype, n, k):
    spec = AffineSpec(bits, group_size, dtype)
    parts = random_parts(spec, n, k, seed=k)
    tensors = AFFINE.pack(spec, *parts)
    for wanted, found in zip(parts, AFFINE.unpack(spec, tensors, k), strict=True):
        assert torch.equal(found, wanted)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    groups = num_groups(group_size, k)
    side = n * groups * (dtype.itemsize + spec.zero_dtype.itemsize)
    assert stored == AFFINE.nbytes(spec, n, k)
    assert 8 * stored == bits * n * k + AFFINE.padding_bits(spec, n, k) + 8 * side
    specs = AFFINE.tensor_specs(spec, n, k)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (s.shape, s.dtype) for name, s in specs.items()
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("k", [256, 768, 1536, 4096, 14336])
def test_usual_widths_are_stored_without_padding(bits, group_size, k):
    spec = AffineSpec(bits, group_size)
    assert AFFINE.padding_bits(spec, 64, k) == 0
    side = 32 / (group_size or k)
    assert AFFINE.bits_per_weight(spec, 64, k) == pytest.approx(bits + side, abs=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [65, 100, 576, 896, 1600, 2880])
def test_padding_stays_below_a_word_or_a_thirty_second(bits, k):
    spec = AffineSpec(bits, 64)
    word = 32 // spec.low_bits
    assert AFFINE.padding_bits(spec, 1, k) <= bits * max(k / 32, word - 1)


def test_code_order_is_the_documented_one():
    """Position of single codes, written out by hand from the description of the layout."""
    spec = AffineSpec(6, 64)
    assert block_width(6, 64, 256) == 64
    codes = torch.zeros(1, 512, dtype=torch.uint8)
    codes[0, 256 + 3 * 64 + 2 * 5 + 1] = 0b101101  # block 1, plane 3, word 5, odd half
    tensors = AFFINE.pack(spec, codes, torch.ones(1, 8), torch.zeros(1, 8))
    low, high = tensors["low"][0], tensors["high"][0]
    assert low.nonzero().flatten().tolist() == [32 + 5]
    assert int(low[37]) & 0xFFFFFFFF == 0b1101 << (16 + 3 * 4)
    assert high.nonzero().flatten().tolist() == [32 + 5]
    assert int(high[37]) & 0xFFFF == 0b10 << (8 + 3 * 2)


def test_dequantize_is_code_minus_zero_times_scale():
    spec = AffineSpec(3, 32, torch.float32)
    codes, scales, zeros = random_parts(spec, 6, 80)
    weight = AFFINE.dequantize(spec, AFFINE.pack(spec, codes, scales, zeros), 80, torch.float32)
    group = torch.arange(80) // 32
    torch.testing.assert_close(weight, (codes.float() - zeros[:, group]) * scales[:, group], rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_concat_puts_weights_side_by_side(bits):
    spec = AffineSpec(bits, 64)
    parts = [AFFINE.pack(spec, *random_parts(spec, n, 200, seed=n)) for n in (3, 8, 1)]
    joined = AFFINE.concat(spec, parts)
    wanted = torch.cat([AFFINE.dequantize(spec, part, 200, torch.float32) for part in parts])
    torch.testing.assert_close(AFFINE.dequantize(spec, joined, 200, torch.float32), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_meta_tensors_give_shapes(bits):
    spec = AffineSpec(bits, 128)
    codes = torch.empty(12, 300, dtype=torch.uint8, device="meta")
    side = torch.empty(12, 3, device="meta")
    tensors = AFFINE.pack(spec, codes, side, side)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: s.shape for name, s in AFFINE.tensor_specs(spec, 12, 300).items()
    }
    assert AFFINE.dequantize(spec, tensors, 300, torch.bfloat16).shape == (12, 300)
    assert AFFINE.concat(spec, [tensors, tensors])["low"].shape[0] == 24


def test_spec_survives_json():
    spec = AffineSpec(5, 0, torch.bfloat16)
    assert get_format("affine").spec_from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "data",
    [
        {"format": "affine", "bits": 7, "group_size": 64, "scale_dtype": "float16"},
        {"format": "affine", "bits": "4", "group_size": 64, "scale_dtype": "float16"},
        {"format": "affine", "bits": 4, "group_size": 48, "scale_dtype": "float16"},
        {"format": "affine", "bits": 4, "group_size": 64, "scale_dtype": "int8"},
        {"format": "affine", "bits": 4, "group_size": 64},
        {"format": "nf4", "bits": 4, "group_size": 64, "scale_dtype": "float16"},
    ],
)
def test_wrong_settings_are_refused(data):
    with pytest.raises(InvalidInputError):
        AffineSpec.from_json(data)


def test_wrong_tensors_are_refused_by_name():
    spec = AffineSpec(4, 64)
    codes, scales, zeros = random_parts(spec, 4, 128)
    with pytest.raises(InvalidInputError, match="16 does not fit in 4 bits"):
        AFFINE.pack(spec, codes.fill_(16), scales, zeros)
    codes.fill_(3)
    with pytest.raises(InvalidInputError, match="scales must be"):
        AFFINE.pack(spec, codes, scales[:, :1], zeros)
    with pytest.raises(InvalidInputError, match="not finite"):
        AFFINE.pack(spec, codes, scales.float() * 1e9, zeros)
    tensors = AFFINE.pack(spec, codes, scales, zeros)
    with pytest.raises(InvalidInputError, match="'low'"):
        AFFINE.dequantize(spec, tensors, 256, torch.float32)
    with pytest.raises(InvalidInputError, match="Unknown storage format 'q4_0'"):
        get_format("q4_0")
