"""HQQ: the published solver to the bit, and ours below its error at the same storage."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qcompiler.data import default_text
from qcompiler.kernels.formats.affine import AFFINE, BITS, AffineSpec
from qcompiler.methods import hqq_reference
from qcompiler.methods.base import get_method

TINY_LLAMA = Path(__file__).parents[2] / "examples/models/tiny-llama"
GROUP_SIZES = [16, 32, 64, 128, 256, 0]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = 0.02 * torch.randn(48, 512, generator=generator)
    outliers = normal.clone()
    outliers[torch.rand(normal.shape, generator=generator) < 0.005] *= 20
    offset = normal + 0.05
    with_constants = normal.clone()
    with_constants[:4] = 0
    with_constants[4, :] = 0.25
    return {
        "normal": normal,
        "outliers": outliers,
        "offset": offset,
        "constant groups": with_constants,
        "large, where the shrinkage acts": 40 * normal,
        "small": 1e-3 * normal,
    }


def package_result(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, ...]:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight.clone(),
        nbits=bits,
        channel_wise=True,
        group_size=group_size or None,
        optimize=True,
        round_zero=bits == 4,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    rows = weight.shape[0]
    return codes.reshape(weight.shape), meta["scale"].reshape(rows, -1), meta["zero"].reshape(rows, -1)


@pytest.mark.parametrize("kind", list(weights()))
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_reference_solver_equals_the_package(bits, group_size, kind):
    weight = weights()[kind]
    codes, scales, zeros = package_result(weight, bits, group_size)
    spec = AffineSpec(bits, group_size, torch.float32)
    ours = get_method("hqq").solve(weight, spec, {"solver": "reference"})
    assert torch.equal(ours.codes, codes.to(torch.uint8))
    assert torch.equal(ours.scales, scales)
    assert torch.equal(ours.zeros, zeros)


def test_reference_solver_stops_when_the_error_stops_falling(monkeypatch):
    rounds = []
    original = hqq_reference._round

    def counted(*args):
        zero, error = original(*args)
        rounds.append(float(error))
        return zero, error

    monkeypatch.setattr(hqq_reference, "_round", counted)
    get_method("hqq").solve(weights()["normal"], AffineSpec(4), {"solver": "reference"})
    assert 1 < len(rounds) <= hqq_reference.ROUNDS
    falls = [later < earlier for earlier, later in pairwise(rounds)]
    assert all(falls[:-1])
    assert not falls[-1] or len(rounds) == hqq_reference.ROUNDS


def squared_error(weight: torch.Tensor, spec: AffineSpec, solver: str) -> torch.Tensor:
    tensors = get_method("hqq").quantize(weight, spec, {"solver": solver})
    return (AFFINE.dequantize(spec, tensors, weight.shape[1], torch.float32) - weight).square()


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.60), (3, 0.82), (4, 0.92)])
def test_search_has_less_error_than_the_published_solver(bits, ratio):
    weight, spec = weights()["normal"], AffineSpec(bits)
    ours, published = (squared_error(weight, spec, solver).sum() for solver in ("search", "reference"))
    assert ours < ratio * published


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_keeps_outliers_and_still_has_less_error(bits):
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(512, 512, generator=generator)
    outliers = torch.rand(weight.shape, generator=generator) < 0.005
    weight[outliers] *= 20
    ours, published = (squared_error(weight, AffineSpec(bits), solver) for solver in ("search", "reference"))
    assert ours.sum() < published.sum()
    assert ours[outliers].sum() < 0.4 * published[outliers].sum()


def test_search_finds_the_line_that_the_weights_lie_on():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (16, 64), generator=generator)
    codes[:, :2] = torch.tensor([0, 7])
    weight = (codes - 3.0) * 0.125
    solution = get_method("hqq").solve(weight, AffineSpec(3))
    assert torch.equal(solution.codes, codes.to(torch.uint8))
    assert torch.equal(solution.scales, torch.full((16, 1), 0.125))
    assert torch.equal(solution.zeros, torch.full((16, 1), 3.0))


@pytest.mark.parametrize("bits", BITS)
def test_search_never_does_worse_than_rounding_in_its_own_measure(bits):
    weight, spec = weights()["outliers"], AffineSpec(bits)
    method = get_method("hqq")
    importance = method.importance(weight, method.statistics(weight, {}))

    def measure(name: str) -> torch.Tensor:
        tensors = get_method(name).quantize(weight, spec)
        error = AFFINE.dequantize(spec, tensors, weight.shape[1], torch.float32) - weight
        return (importance * error.square()).unflatten(1, (-1, 64)).sum(-1)

    assert (measure("hqq") <= measure("rtn") * (1 + 1e-5)).all()


def test_a_scale_moved_from_a_column_to_its_input_changes_nothing_else():
    """With one column per group the codes are the same and the scales move along by powers of two."""
    weight = weights()["normal"][:, :64]
    moved = weight.clone()
    moved[:, :16] *= 2
    method, spec = get_method("hqq"), AffineSpec(3, 16)
    plain, scaled = method.solve(weight, spec), method.solve(moved, spec)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scales[:, 0], 2 * plain.scales[:, 0])
    assert torch.equal(scaled.scales[:, 1:], plain.scales[:, 1:])


def test_columns_of_a_few_rows_all_count_the_same():
    method, weight = get_method("hqq"), weights()["normal"]
    few, many = (method.statistics(weight[:rows], {})[1] for rows in (8, 48))
    assert torch.equal(few, torch.ones(512))
    assert many.std() > 0.1


@pytest.mark.slow
def test_search_keeps_tiny_llama_closer_to_itself_than_the_published_solver():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    from qcompiler.quality import QualityMeter, windows

    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    text = tokenizer.encode(default_text("eval")[:40000], add_special_tokens=False).ids
    parts = [torch.tensor(list(w)) for w in windows(text, 512, 4096)]
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    originals = {name: module.weight.detach().clone() for name, module in linears.items()}
    spec = AffineSpec(2)

    @torch.inference_mode()
    def outputs() -> list[torch.Tensor]:
        return [model(part[None]).logits[0, :-1] for part in parts]

    before = outputs()
    divergence = {}
    for solver in ("search", "reference"):
        for name, module in linears.items():
            tensors = get_method("hqq").quantize(originals[name], spec, {"solver": solver}, name=name)
            module.weight.data = AFFINE.dequantize(spec, tensors, originals[name].shape[1], torch.float32)
        meter = QualityMeter()
        for part, p, q in zip(parts, before, outputs(), strict=True):
            meter.update(p, q, part[1:])
        divergence[solver] = meter.result().kl_mean
    assert divergence["search"] < 0.62 * divergence["reference"]
