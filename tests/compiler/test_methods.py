"""What every quantization method promises, whatever its numbers."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, BITS, AffineSpec
from qcompiler.methods import base
from qcompiler.methods.base import get_method, method_names, register_method
from qcompiler.methods.rtn import RoundToNearest

METHODS = [("rtn", {}), ("hqq", {}), ("hqq", {"solver": "reference"})]
OWN = METHODS[:2]  # the published solver is kept as it is, its edges included


def matrix(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def round_trip(name, weight, spec, options):
    tensors = get_method(name).quantize(weight, spec, options)
    return AFFINE.dequantize(spec, tensors, weight.shape[1], torch.float32)


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_error_falls_as_the_width_grows(name, options, bits):
    weight = matrix()
    spec = get_method(name).resolve_spec(bits)
    assert spec == AffineSpec(bits, 64)
    error = (round_trip(name, weight, spec, options) - weight).norm() / weight.norm()
    # A uniform quantizer over the ±2.4 σ that 64 normal values span has a step of 4.8 σ / (2^bits - 1).
    assert error < 4.8 / (2**bits - 1) / 12**0.5 * 1.1


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("group_size", [0, 16, 128])
@pytest.mark.parametrize("columns", [256, 200, 8])
def test_group_sizes_and_short_last_groups(name, options, group_size, columns):
    weight = matrix(columns=columns)
    spec = get_method(name).resolve_spec(6, group_size)
    restored = round_trip(name, weight, spec, options)
    assert restored.shape == weight.shape
    assert (restored - weight).norm() < 0.06 * weight.norm()


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_a_short_group_is_solved_like_a_tensor_of_its_own(name, options):
    weight = matrix(columns=80)
    weight[:, 64:] *= 10
    spec = AffineSpec(8, 64)
    restored = round_trip(name, weight, spec, options)
    assert (restored[:, :64] - weight[:, :64]).norm() < 0.01 * weight[:, :64].norm()
    assert (restored[:, 64:] - weight[:, 64:]).norm() < 0.01 * weight[:, 64:].norm()


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_zero_groups_are_exact(name, options):
    weight = matrix()
    weight[3] = 0
    weight[5, 64:128] = 0
    restored = round_trip(name, weight, AffineSpec(4), options)
    assert torch.equal(restored[3], weight[3])
    assert torch.equal(restored[5, 64:128], weight[5, 64:128])


@pytest.mark.parametrize(("name", "options"), OWN)
@pytest.mark.parametrize("value", [1.0, -0.0123, 3e-6, -700.0, 2.0**-20])
def test_constant_groups_of_bf16_weights_are_exact(name, options, value):
    weight = matrix()
    weight[2, :64] = torch.tensor(value).bfloat16()
    restored = round_trip(name, weight, AffineSpec(2), options)
    assert torch.equal(restored[2, :64], weight[2, :64])


@pytest.mark.parametrize(("name", "options"), OWN)
@pytest.mark.parametrize("bits", [2, 8])
def test_a_narrow_group_far_from_zero_keeps_bf16_accuracy(name, options, bits):
    weight = 1.0 + 1e-4 * torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    restored = round_trip(name, weight, AffineSpec(bits), options)
    assert (restored - weight).abs().max() <= 2.0**-9


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(name, options, bad):
    weight = matrix()
    weight[7, 9] = bad
    with pytest.raises(InvalidInputError, match=r"layers\.3\.down_proj.*1 of 6144"):
        get_method(name).quantize(weight, AffineSpec(4), options, name="layers.3.down_proj")


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize(("factor", "word"), [(1e9, "beyond"), (1e-9, "too small")])
def test_what_fp16_scales_cannot_hold_is_refused_and_fp32_scales_can(name, options, factor, word):
    weight = matrix() * factor
    with pytest.raises(InvalidInputError, match=f"up_proj.*{word}"):
        get_method(name).quantize(weight, AffineSpec(4), options, name="up_proj")
    if options.get("solver") != "reference":  # the published solver gives up on ranges below 1e-4
        restored = round_trip(name, weight, AffineSpec(4, 64, torch.float32), options)
        assert (restored - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_what_is_no_float_matrix_is_refused(name, options):
    for wrong in (torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4), torch.zeros(0, 64)):
        with pytest.raises(InvalidInputError, match="matrix was expected"):
            get_method(name).quantize(wrong, AffineSpec(4), options)


@pytest.mark.parametrize(("name", "options"), OWN)
@pytest.mark.parametrize("columns", [256, 200])
def test_the_result_does_not_depend_on_the_chunks(name, options, columns):
    weight = matrix(rows=37, columns=columns)
    method, spec = get_method(name), AffineSpec(3)
    whole = method.solve(weight, spec, options, chunk_weights=1 << 30)
    for rows in (1, 5, 36):
        part = method.solve(weight, spec, options, chunk_weights=rows * columns)
        assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_scales_and_zeros_are_stored_as_they_were_solved(name, options):
    solution = get_method(name).solve(matrix(), AffineSpec(4), options)
    assert (solution.scales > 0).all()
    if options.get("solver") != "reference":
        assert torch.equal(solution.scales.half().float(), solution.scales)
        assert torch.equal(solution.zeros.half().float(), solution.zeros)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_the_weight_is_left_alone_and_bf16_is_taken(name, options):
    weight = matrix().bfloat16()
    before = weight.clone()
    tensors = get_method(name).quantize(weight, AffineSpec(4), options)
    wide = get_method(name).quantize(weight.float(), AffineSpec(4), options)
    assert torch.equal(weight, before)
    assert all(torch.equal(tensors[key], wide[key]) for key in wide)


def test_unknown_names_widths_and_options_are_refused_with_the_known_ones():
    with pytest.raises(InvalidInputError, match="hqq, none, rtn"):
        get_method("magic")
    with pytest.raises(InvalidInputError, match="2, 3, 4, 5, 6, 8"):
        get_method("rtn").resolve_spec(7)
    with pytest.raises(InvalidInputError, match="group size 48"):
        get_method("rtn").resolve_spec(4, 48)
    with pytest.raises(InvalidInputError, match="no option 'solver'"):
        get_method("rtn").validate({"solver": "search"})
    with pytest.raises(InvalidInputError, match="search, reference"):
        get_method("hqq").validate({"solver": "fast"})
    with pytest.raises(InvalidInputError, match="takes str"):
        get_method("hqq").validate({"solver": 3})
    assert get_method("hqq").validate()["solver"] == "search"


def test_a_method_can_be_registered(monkeypatch):
    monkeypatch.setattr(base, "_registered", {})

    @register_method
    class Mine(RoundToNearest):
        name = "mine"

    assert isinstance(get_method("mine"), Mine)
    assert "mine" in method_names()
    with pytest.raises(InvalidInputError, match="already registered"):
        register_method(type("Other", (RoundToNearest,), {"name": "mine"}))
    with pytest.raises(InvalidInputError, match="already registered"):
        register_method(type("Other", (RoundToNearest,), {"name": "hqq"}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("qcompiler.methods.rtn:RoundToNearest", None),
        ("qcompiler.methods.rtn:Missing", "does not load"),
        ("no_such_package:Thing", "does not load"),
        ("collections:OrderedDict", "not a Method class"),
    ],
)
def test_plug_ins_come_from_entry_points(monkeypatch, value, message):
    plugin = EntryPoint("plugged", value, base.ENTRY_POINT_GROUP)

    def entry_points(*, group, name="plugged"):
        return [plugin] if (group, name) == (base.ENTRY_POINT_GROUP, "plugged") else []

    monkeypatch.setattr(base, "entry_points", entry_points)
    assert "plugged" in method_names()
    if message is None:
        assert isinstance(get_method("plugged"), RoundToNearest)
    else:
        with pytest.raises(InvalidInputError, match=message):
            get_method("plugged")
