"""The body_tail format: an affine body, corrections in slots, in exactly the bytes it claims."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, BODY_TAIL, BodyTailSpec, get_format
from qcompiler.kernels.formats.affine import num_groups
from qcompiler.kernels.formats.body_tail import TAIL_BITS, decode_tail, in_blocks, tail_layout


def parts(spec: BodyTailSpec, n: int, k: int, seed: int = 0):
    """A random packed body, corrections for every weight, and the most columns that may be chosen."""
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    zeros = torch.rand(n, groups, generator=generator) * (2**spec.bits - 1)
    _, slots, block = tail_layout(spec, k)
    score = in_blocks(torch.rand(n, k, generator=generator) + 1, block)
    picks = score.topk(min(slots, block), dim=2).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(2, picks, True).flatten(1)[:, :k]
    return AFFINE.pack(spec.body, codes, scales, zeros), torch.randn(n, k, generator=generator), chosen


def tail_of(spec: BodyTailSpec, tensors, k: int) -> torch.Tensor:
    """The corrections alone, float32 [N, K], read slot by slot."""
    rows = tensors["low"].shape[0]
    dense = torch.zeros(rows, k, dtype=torch.float64)
    columns, values = decode_tail(tensors["tail"], tensors["tail_scales"], spec, k)
    for slot in range(columns.shape[0]):
        for row in range(rows):
            if columns[slot, row] < k:
                dense[row, columns[slot, row]] += values[slot, row].double()
    return dense.float()


@pytest.mark.parametrize("tail_bits", TAIL_BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (5, 200), (4, 256), (3, 1000), (1, 2048)])
def test_corrections_come_back_within_half_a_step(tail_bits, n, k):
    spec = BodyTailSpec(3, 64, 0.02, tail_bits)
    body, rest, chosen = parts(spec, n, k)
    tensors = BODY_TAIL.pack(spec, body, rest, chosen)
    wanted = AFFINE.dequantize(spec.body, body, k, torch.float32)
    found = BODY_TAIL.dequantize(spec, tensors, k, torch.float32)
    assert torch.equal(found[~chosen], wanted[~chosen])
    torch.testing.assert_close(found, wanted + tail_of(spec, tensors, k))
    correction = (found - wanted)[chosen]
    top = torch.where(chosen, rest, 0).abs().amax(1, keepdim=True).expand(n, k)[chosen]
    # Half a step of the logarithm, fp16 of the row's scale; the smallest magnitude and zero near zero.
    relative = 2 ** (spec.step / 2) - 1 + 2**-10
    smallest = top * 2.0 ** ((1 - spec.levels) * spec.step)
    assert ((correction - rest[chosen]).abs() <= relative * rest[chosen].abs() + smallest / 2 + 1e-6).all()


@given(
    bits=st.sampled_from([2, 3, 4]),
    tail_bits=st.sampled_from(TAIL_BITS),
    fraction=st.floats(1e-4, 0.25),
    n=st.integers(1, 5),
    k=st.integers(1, 700),
)
@settings(max_examples=40, deadline=None)
def test_any_size_takes_the_bytes_it_claims(bits, tail_bits, fraction, n, k):
    spec = BodyTailSpec(bits, 32, fraction, tail_bits)
    body, rest, chosen = parts(spec, n, k, seed=k)
    tensors = BODY_TAIL.pack(spec, body, rest, chosen)
    blocks, slots, block = tail_layout(spec, k)
    assert (blocks - 1) * block < k <= blocks * block
    assert block <= 1 << spec.position_bits
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert (
        stored
        == BODY_TAIL.nbytes(spec, n, k)
        == AFFINE.nbytes(spec.body, n, k) + 2 * n * (blocks * slots + 1)
    )
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (s.shape, s.dtype) for name, s in BODY_TAIL.tensor_specs(spec, n, k).items()
    }


@pytest.mark.parametrize("fraction", [0.004, 0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("k", [1024, 4096, 8192, 14336])
def test_positions_cost_their_bits_and_the_fraction_is_kept(fraction, k):
    spec = BodyTailSpec(3, 64, fraction)
    blocks, slots, _ = tail_layout(spec, k)
    assert blocks * slots == pytest.approx(fraction * k, rel=0.08, abs=1)
    n = 64
    assert 8 * BODY_TAIL.tail_nbytes(spec, n, k) == n * (blocks * slots * (spec.tail_bits + 8) + 16)


def test_a_word_is_the_documented_one():
    spec = BodyTailSpec(4, 64, 0.01, 8)
    assert tail_layout(spec, 400) == (2, 2, 200)
    body, _, _ = parts(spec, 1, 400)
    rest, chosen = torch.zeros(1, 400), torch.zeros(1, 400, dtype=torch.bool)
    rest[0, 203], rest[0, 390] = 2.0, -1.0  # one octave, 16 steps, below the row's largest
    chosen[0, [203, 390]] = True
    tensors = BODY_TAIL.pack(spec, body, rest, chosen)
    words = [int(word) & 0xFFFF for word in tensors["tail"][:, 0]]
    assert words == [0, 0, (127 << 8) + 3, (1 << 15) + ((127 - 16) << 8) + 190]
    assert tensors["tail_scales"].tolist() == [2.0]


def test_a_position_past_the_end_means_nothing():
    spec = BodyTailSpec(4, 64, 0.01, 8)
    body, rest, chosen = parts(spec, 3, 90)
    tensors = BODY_TAIL.pack(spec, body, rest, chosen)
    tensors["tail"] = torch.full_like(tensors["tail"], (5 << 8) + 200)
    wanted = AFFINE.dequantize(spec.body, body, 90, torch.float32)
    assert torch.equal(BODY_TAIL.dequantize(spec, tensors, 90, torch.float32), wanted)


def test_concat_puts_weights_side_by_side():
    spec = BodyTailSpec(3, 64, 0.02)
    joined = [BODY_TAIL.pack(spec, *parts(spec, n, 300, seed=n)) for n in (3, 8, 1)]
    wanted = torch.cat([BODY_TAIL.dequantize(spec, part, 300, torch.float32) for part in joined])
    found = BODY_TAIL.dequantize(spec, BODY_TAIL.concat(spec, joined), 300, torch.float32)
    assert torch.equal(found, wanted)


def test_settings_survive_json_and_wrong_ones_are_refused():
    spec = BodyTailSpec(3, 128, 0.0125, 6, torch.bfloat16)
    assert get_format("body_tail").spec_from_json(spec.to_json()) == spec
    for change in ({"bits": True}, {"tail_fraction": 1}, {"tail_bits": 9}, {"format": "affine"}, {"more": 1}):
        with pytest.raises(InvalidInputError):
            BodyTailSpec.from_json({**spec.to_json(), **change})
    for fraction in (0.0, -0.1, 0.3, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="tail of"):
            BodyTailSpec(3, 64, fraction)


def test_more_columns_than_slots_and_what_is_not_finite_are_refused():
    spec = BodyTailSpec(3, 64, 0.005)
    body, rest, chosen = parts(spec, 2, 256)
    with pytest.raises(InvalidInputError, match="More than 1 tail"):
        BODY_TAIL.pack(spec, body, rest, torch.ones_like(chosen))
    with pytest.raises(InvalidInputError, match="not finite"):
        BODY_TAIL.pack(spec, body, torch.full_like(rest, math.nan), chosen)
    tensors = BODY_TAIL.pack(spec, body, rest, chosen)
    with pytest.raises(InvalidInputError, match="'tail'"):
        BODY_TAIL.dequantize(spec, {**tensors, "tail": tensors["tail"][:0]}, 256, torch.float32)
