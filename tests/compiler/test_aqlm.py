"""AQLM's searches: each step does what its formula says, and the error falls from phase to phase."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from qcompiler.calibration import CalibrationSettings, Moments, calibrate
from qcompiler.capture import ModelSource, capture
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec, AffineSpec
from qcompiler.methods.aqlm import LayerSettings
from qcompiler.methods.aqlm.codebooks import adam_codebooks, refit_scales, residual_kmeans, solve_codebooks
from qcompiler.methods.aqlm.layer import corrected_weight, fit_layer
from qcompiler.methods.aqlm.method import tuning_settings
from qcompiler.methods.aqlm.search import Metric, choose_codes, descent_pass, feedback_pass, sum_codewords
from qcompiler.methods.base import get_method

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"


def inputs(size: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    spread = torch.logspace(0, -1.5, size)[:, None]
    return torch.randn(tokens, size, generator=generator) @ (spread * mixing)


def layer(n: int = 48, k: int = 64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    x = inputs(k)
    return weight, x, Metric(x.T @ x / len(x), 8)


def relative(weight: torch.Tensor, found: torch.Tensor, metric: Metric) -> float:
    return float(metric.error(found - weight).sum() / metric.error(weight).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_full_beam_finds_the_nearest_sum(count):
    torch.manual_seed(0)
    books, target = torch.randn(count, 6, 4), torch.randn(20, 4)
    codes = choose_codes(target, books, beam=6**count)
    every = torch.tensor(list(itertools.product(range(6), repeat=count)))
    distances = torch.cdist(target, sum_codewords(books, every))
    found = (target - sum_codewords(books, codes)).norm(dim=1)
    torch.testing.assert_close(found, distances.amin(1), rtol=1e-4, atol=1e-4)


def test_a_wider_beam_is_not_worse_and_a_start_is_kept():
    torch.manual_seed(0)
    books, target = torch.randn(2, 32, 8), torch.randn(200, 8)

    def error(codes):
        return (target - sum_codewords(books, codes)).square().sum(1)

    narrow, wide = (error(choose_codes(target, books, beam)).sum() for beam in (1, 16))
    assert wide < narrow
    start = choose_codes(target, books, beam=16)
    assert (error(choose_codes(target, books, 1, start)) <= error(start) + 1e-5).all()


def test_feedback_beats_rounding_alone_and_descent_never_loses():
    weight, _, metric = layer()
    books = residual_kmeans(weight, torch.ones(48), metric, (2, 16), 10, torch.Generator().manual_seed(0))
    plain = choose_codes(weight.reshape(-1, 8), books, 8).reshape(48, 8, 2)
    codes = feedback_pass(weight, books, metric, 8)
    errors = [relative(weight, sum_codewords(books, c).flatten(1), metric) for c in (plain, codes)]
    assert errors[1] < 0.9 * errors[0]
    for _ in range(3):
        codes = descent_pass(weight, codes, books, metric, 8)
        errors.append(relative(weight, sum_codewords(books, codes).flatten(1), metric))
        assert errors[-1] <= errors[-2] * (1 + 1e-5)


def test_feedback_with_one_group_is_the_exact_search():
    torch.manual_seed(0)
    x = inputs(8)
    metric = Metric(x.T @ x / len(x), 8)
    weight, books = torch.randn(30, 8), torch.randn(1, 64, 8)
    codes = feedback_pass(weight, books, metric, 1)
    errors = torch.stack([metric.error(weight - books[0][c]) for c in range(64)], 1)
    torch.testing.assert_close(
        metric.error(weight - books[0][codes[:, 0, 0]]), errors.amin(1), rtol=1e-4, atol=1e-4
    )


def test_conjugate_gradients_reach_the_least_squares_codebooks():
    weight, _, metric = layer()
    scales = torch.rand(48) + 0.5
    codes = torch.randint(0, 8, (48, 8, 1))
    start = torch.zeros(1, 8, 8)
    solved = solve_codebooks(
        weight / scales[:, None], codes, start, scales, metric, steps=80
    ).requires_grad_()
    difference = sum_codewords(solved, codes).flatten(1) * scales[:, None] - weight
    metric.error(difference).sum().backward()
    begin = start.clone().requires_grad_()
    metric.error(sum_codewords(begin, codes).flatten(1) * scales[:, None] - weight).sum().backward()
    assert solved.grad.norm() < 1e-3 * begin.grad.norm()


def test_a_few_conjugate_gradients_beat_a_hundred_adam_steps():
    weight, _, metric = layer()
    scales = torch.ones(48)
    books = residual_kmeans(weight, scales, metric, (2, 16), 10, torch.Generator().manual_seed(0))
    codes = feedback_pass(weight, books, metric, 8)
    solved = sum_codewords(solve_codebooks(weight, codes, books, scales, metric), codes).flatten(1)
    adam_books, adam_scales = adam_codebooks(weight, codes, books, scales, metric)
    adam = sum_codewords(adam_books, codes).flatten(1) * adam_scales[:, None]
    before = relative(weight, sum_codewords(books, codes).flatten(1), metric)
    assert relative(weight, solved, metric) < relative(weight, adam, metric) < before


def test_refit_scales_is_the_best_multiple_of_each_row():
    weight, _, metric = layer()
    shape = weight + 0.3 * torch.randn_like(weight)
    scales = refit_scales(weight, shape, torch.ones(48), metric)
    best = metric.error(weight - scales[:, None] * shape)
    for factor in (0.98, 1.02):
        assert (metric.error(weight - factor * scales[:, None] * shape) > best).all()
    assert torch.equal(refit_scales(weight, torch.zeros_like(weight), torch.ones(48), metric), torch.ones(48))


def test_corrected_weight_makes_up_for_changed_inputs():
    weight, x, _ = layer()
    changed = x + 0.3 * x.roll(1, 1)
    moments = Moments(changed.T @ changed / 512, changed.T @ x / 512, 512)
    metric = Metric(moments.gram, 8, damping=1e-6)
    better = corrected_weight(weight, moments, metric)
    wanted = x @ weight.T
    assert (changed @ better.T - wanted).norm() < 0.05 * (changed @ weight.T - wanted).norm()


@pytest.mark.parametrize("k", [64, 61])
@pytest.mark.parametrize("scheme", ["2x4", "1x6"])
def test_a_layer_is_fitted_better_round_by_round(k, scheme):
    from qcompiler.methods.aqlm.layer import make_metric

    weight, x = layer()[0][:, :k], inputs(k)
    spec = AdditiveSpec.parse(scheme)
    metric = make_metric(Moments(x.T @ x / 512, None, 512), spec, 0.01)
    once, often = (fit_layer(weight, metric, spec, LayerSettings(rounds=r), seed=0) for r in (1, 6))
    assert often.error < once.error < 0.6
    assert often.weight().shape == weight.shape
    again = fit_layer(weight, metric, spec, LayerSettings(rounds=6), seed=0)
    assert torch.equal(again.codes, often.codes)
    stored = ADDITIVE.pack(spec, often.codes, often.codebooks, often.scales)
    torch.testing.assert_close(
        ADDITIVE.dequantize(spec, stored, k, torch.float32), often.weight(), rtol=2e-3, atol=2e-3
    )


@pytest.mark.slow
def test_tuning_lowers_the_error_of_blocks():
    source = ModelSource.from_pretrained(TINY)
    gm = capture(source, torch.float32).graph
    text = [(7 * i * i + 3 * i) % 2048 for i in range(600)]
    options = {"beam": 2, "rounds": 1, "epochs": 5, "rate": 0.01, "code_updates": 1}

    def choose(name, out_features, in_features):
        return AdditiveSpec(2, 6) if name.startswith("model.layers.1.") else "kept"

    settings = CalibrationSettings(64, 512)
    load = source.checkpoint.tensor
    outcome = calibrate(gm, load, text, get_method("aqlm"), choose, settings, options=options)
    figures = outcome.blocks["model.layers.1"]
    assert figures["error"] < figures["error_before"]
    assert figures["codes_changed"] > 0
    assert len(outcome.specs) == 7
    assert set(outcome.parameters) == {
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight",
    }  # fmt: skip
    # 1.5 bits of codes: what the inputs of the text see of the weight is kept, mostly.
    assert all(error < 0.35 for error in figures["layer_error"].values())
    stored = outcome.tensors("model.layers.1.mlp.down_proj")
    assert ADDITIVE.dequantize(AdditiveSpec(2, 6), stored, 768, torch.float32).isfinite().all()


def test_schemes_follow_from_bits_and_options():
    method = get_method("aqlm")
    assert method.resolve_spec(2) == AdditiveSpec(2, 8)
    assert method.resolve_spec(3) == AdditiveSpec(3, 8)
    assert method.resolve_spec(2, 4) == AdditiveSpec(1, 8, 4)
    assert method.resolve_spec(2, None, {"scheme": "1x16"}) == AdditiveSpec(1, 16)
    for bits, group in ((8, 8), (1, 4), (2, 64)):
        with pytest.raises(InvalidInputError):
            method.resolve_spec(bits, group)
    assert tuning_settings(method.validate({"epochs": 0})).epochs == 0


def test_without_calibration_it_minimises_the_error_of_the_weight():
    weight = layer()[0]
    method, spec = get_method("aqlm"), AdditiveSpec(2, 4)
    stored = method.quantize(weight, spec)
    found = ADDITIVE.dequantize(spec, stored, 64, torch.float32)
    assert (found - weight).norm() < 0.55 * weight.norm()
    assert all(torch.equal(tensor, method.quantize(weight, spec)[part]) for part, tensor in stored.items())
    # Codewords are stored at a root mean square of 1, whatever the size of the weight.
    small = method.quantize(weight * 1e-6, spec)
    assert float(small["codebooks"].float().square().mean()) == pytest.approx(1.0, rel=0.01)
    with pytest.raises(InvalidInputError, match="finite"):
        method.quantize(weight / 0, spec)


def test_a_spec_of_another_format_is_refused():
    with pytest.raises(InvalidInputError, match="additive format"):
        get_method("aqlm").quantize(layer()[0], AffineSpec(2, 64))
