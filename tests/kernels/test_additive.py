"""The additive format: exact round trips, exact bits, and the aqlm package's reading of the same weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec, get_format
from qcompiler.kernels.formats.additive import from_aqlm, num_groups, to_aqlm

SCHEMES = ["1x16", "2x8", "1x8", "1x12", "2x12", "3x8", "4x5", "2x10"]


def random_parts(spec: AdditiveSpec, n: int, k: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, num_groups(spec.group_size, k), spec.codebooks)
    codes = torch.randint(0, spec.codewords, shape, generator=generator)
    codes.flatten()[0] = spec.codewords - 1
    books = torch.randn(spec.codebooks, spec.codewords, spec.group_size, generator=generator).half()
    scales = (torch.rand(n, generator=generator) + 0.5).half()
    return codes, books, scales


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [4, 8, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 40), (5, 67)])
def test_round_trip_is_exact(scheme, group_size, n, k):
    spec = AdditiveSpec.parse(scheme, group_size)
    codes, books, scales = random_parts(spec, n, k)
    tensors = ADDITIVE.pack(spec, codes, books, scales)
    found, found_books, found_scales = ADDITIVE.unpack(spec, tensors, k)
    assert torch.equal(found.long(), codes)
    assert torch.equal(found_books[0], books)
    assert torch.equal(found_scales, scales)


@given(
    codebooks=st.integers(1, 4), bits=st.integers(2, 12), d=st.sampled_from([4, 8, 16]),
    n=st.integers(1, 7), k=st.integers(1, 130),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_bit_is_counted(codebooks, bits, d, n, k):
    spec = AdditiveSpec(codebooks, bits, d)
    tensors = ADDITIVE.pack(spec, *random_parts(spec, n, k, seed=k))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored == ADDITIVE.nbytes(spec, n, k)
    code_bits = num_groups(d, k) * codebooks * bits
    row_bytes = -(-code_bits // 8)
    assert stored == n * row_bytes + 2 * codebooks * 2**bits * d + 2 * n + 4
    specs = ADDITIVE.tensor_specs(spec, n, k)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (s.shape, s.dtype) for name, s in specs.items()
    }


def test_bits_per_weight_of_the_usual_schemes():
    # 2 bits of codes, 2·256·8 half-precision codewords, a scale per row, one row count.
    expected = 2 + (2 * 256 * 8 * 16 + 4096 * 16 + 32) / 4096**2
    assert ADDITIVE.bits_per_weight(AdditiveSpec.parse("2x8"), 4096, 4096) == pytest.approx(expected)
    assert ADDITIVE.bits_per_weight(AdditiveSpec.parse("1x12"), 4096, 4096) == pytest.approx(1.5, abs=0.04)
    assert ADDITIVE.bits_per_weight(AdditiveSpec.parse("1x16"), 4096, 4096) == pytest.approx(2.5, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_aqlm_package_reads_the_same_weight(scheme, group_size):
    oracle = pytest.importorskip("aqlm.utils")
    spec = AdditiveSpec.parse(scheme, group_size)
    k = 5 * group_size
    tensors = ADDITIVE.pack(spec, *random_parts(spec, 7, k))
    theirs = to_aqlm(spec, tensors, k)
    assert theirs["codes"].shape == (7, 5, spec.codebooks)
    assert theirs["codebooks"].shape == (spec.codebooks, spec.codewords, 1, group_size)
    weight = oracle._dequantize_weight(
        oracle.unpack_int_data(theirs["codes"], spec.bits),
        theirs["codebooks"].float(),
        theirs["scales"].float(),
    )
    ours = ADDITIVE.dequantize(spec, tensors, k, torch.float32)
    torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-6)
    found_spec, back = from_aqlm(**theirs)
    assert found_spec == spec
    for part, tensor in tensors.items():
        assert torch.equal(back[part], tensor), part


def test_what_the_aqlm_layout_cannot_hold_is_refused():
    spec = AdditiveSpec(2, 8)
    one = ADDITIVE.pack(spec, *random_parts(spec, 4, 64))
    with pytest.raises(InvalidInputError, match="one set of codebooks"):
        to_aqlm(spec, ADDITIVE.concat(spec, [one, one]), 64)
    with pytest.raises(InvalidInputError, match="multiple of 8"):
        to_aqlm(spec, one, 62)
    theirs = to_aqlm(spec, one, 64)
    with pytest.raises(InvalidInputError, match="2 output rows"):
        from_aqlm(theirs["codes"], theirs["codebooks"].expand(-1, -1, 2, -1), theirs["scales"])


def test_concat_keeps_each_part_exactly():
    spec = AdditiveSpec.parse("2x8")
    parts = [ADDITIVE.pack(spec, *random_parts(spec, n, 44, seed=n)) for n in (3, 8, 1)]
    joined = ADDITIVE.concat(spec, parts)
    wanted = torch.cat([ADDITIVE.dequantize(spec, part, 44, torch.float32) for part in parts])
    assert torch.equal(ADDITIVE.dequantize(spec, joined, 44, torch.float32), wanted)
    assert joined["rows"].tolist() == [3, 8, 1]
    nested = ADDITIVE.concat(spec, [joined, parts[0]])
    assert torch.equal(ADDITIVE.dequantize(spec, nested, 44, torch.float32)[12:], wanted[:3])
    stored = sum(tensor.numel() * tensor.element_size() for tensor in joined.values())
    assert stored == ADDITIVE.nbytes(spec, 12, 44, sets=3)
    with pytest.raises(InvalidInputError, match="equal in_features"):
        ADDITIVE.concat(spec, [parts[0], ADDITIVE.pack(spec, *random_parts(spec, 3, 80))])


def test_meta_tensors_give_shapes():
    spec = AdditiveSpec.parse("1x12")
    codes = torch.empty(12, 5, 1, dtype=torch.int64, device="meta")
    books, scales = torch.empty(1, 4096, 8, device="meta"), torch.empty(12, device="meta")
    tensors = ADDITIVE.pack(spec, codes, books, scales)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: s.shape for name, s in ADDITIVE.tensor_specs(spec, 12, 40).items()
    }
    assert ADDITIVE.dequantize(spec, tensors, 40, torch.bfloat16).shape == (12, 40)


def test_spec_survives_json_and_text():
    spec = AdditiveSpec.parse("2x12", 16)
    assert get_format("additive").spec_from_json(spec.to_json()) == spec
    assert spec.scheme == "2x12"


@pytest.mark.parametrize("scheme", ["2", "x8", "0x8", "9x8", "2x17", "2x1", "-1x8", "2x8x8", "²x8"])
def test_wrong_schemes_are_refused(scheme):
    with pytest.raises(InvalidInputError):
        AdditiveSpec.parse(scheme)


@pytest.mark.parametrize(
    "data",
    [
        {"format": "additive", "codebooks": 2, "bits": 8, "group_size": 32},
        {"format": "additive", "codebooks": "2", "bits": 8, "group_size": 8},
        {"format": "additive", "codebooks": 2, "bits": 8},
        {"format": "affine", "codebooks": 2, "bits": 8, "group_size": 8},
    ],
)
def test_wrong_settings_are_refused(data):
    with pytest.raises(InvalidInputError):
        AdditiveSpec.from_json(data)


def test_wrong_tensors_are_refused_by_name():
    spec = AdditiveSpec.parse("2x5")
    codes, books, scales = random_parts(spec, 4, 64)
    with pytest.raises(InvalidInputError, match="does not fit in 5 bits"):
        ADDITIVE.pack(spec, codes + 1, books, scales)
    with pytest.raises(InvalidInputError, match="not finite"):
        ADDITIVE.pack(spec, codes, books.float() * 1e9, scales)
    with pytest.raises(InvalidInputError, match="scales must be"):
        ADDITIVE.pack(spec, codes, books, scales[:3])
    tensors = ADDITIVE.pack(spec, codes, books, scales)
    with pytest.raises(InvalidInputError, match="'codes'"):
        ADDITIVE.dequantize(spec, tensors, 128, torch.float32)
    with pytest.raises(InvalidInputError, match="'rows'"):
        ADDITIVE.dequantize(spec, {**tensors, "rows": tensors["rows"] + 1}, 64, torch.float32)
    with pytest.raises(InvalidInputError, match="'scales' is missing"):
        ADDITIVE.dequantize(spec, {k: v for k, v in tensors.items() if k != "scales"}, 64, torch.float32)
