"""Quality metrics against closed forms and against torch's own loss functions."""

from __future__ import annotations

import json
import math

import pytest
import torch

from qcompiler.data import default_text
from qcompiler.kernels.errors import InvalidInputError, QualityGateError
from qcompiler.quality import Quality, QualityMeter, windows


def logits(seed: int, tokens: int = 12, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_identical_models_have_no_divergence():
    meter = QualityMeter()
    meter.update(logits(0), logits(0), torch.arange(12))
    quality = meter.result()
    assert quality.kl_mean == 0.0
    assert quality.kl_se == 0.0
    assert quality.top1_agreement == 1.0
    assert quality.perplexity_ratio == 1.0


def test_figures_match_torch():
    p, q, targets = logits(1), logits(2), torch.arange(12)
    meter = QualityMeter(chunk=5)
    meter.update(p, q, targets)
    quality = meter.result()
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert quality.kl_mean == pytest.approx(float(kl), rel=1e-5)
    assert quality.perplexity == pytest.approx(
        math.exp(torch.nn.functional.cross_entropy(q.double(), targets)), rel=1e-5
    )
    assert quality.perplexity_original == pytest.approx(
        math.exp(torch.nn.functional.cross_entropy(p.double(), targets)), rel=1e-5
    )
    assert quality.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_shift_of_all_logits_means_nothing():
    meter = QualityMeter()
    meter.update(logits(3), logits(3) + 7.0, torch.arange(12))
    assert meter.result().kl_mean < 1e-6


def test_standard_error_is_over_windows():
    meter = QualityMeter()
    means = []
    for seed in range(6):
        p, q = logits(seed), logits(100 + seed)
        meter.update(p, q, torch.arange(12))
        means.append(
            torch.nn.functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        )
    expected = torch.stack(means).std() / 6**0.5
    assert meter.result().kl_se == pytest.approx(float(expected), rel=1e-4)


def test_one_window_falls_back_to_tokens():
    p, q = logits(1), logits(2)
    meter = QualityMeter()
    meter.update(p, q, torch.arange(12))
    per_token = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert meter.result().kl_se == pytest.approx(float(per_token.std() / 12**0.5), rel=1e-4)


def test_tokens_ruled_out_by_both_models_are_left_out():
    p, q = logits(1), logits(2)
    masked_p, masked_q = p.clone(), q.clone()
    masked_p[:, 40:] = -math.inf
    masked_q[:, 40:] = -math.inf
    meter, short = QualityMeter(), QualityMeter()
    meter.update(masked_p, masked_q, torch.arange(12))
    short.update(p[:, :40], q[:, :40], torch.arange(12))
    assert meter.result().kl_mean == pytest.approx(short.result().kl_mean, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    broken = logits(2)
    broken[3, 4] = bad
    with pytest.raises(QualityGateError, match="quantized model"):
        QualityMeter().update(logits(1), broken, torch.arange(12))
    if bad != -math.inf:
        with pytest.raises(InvalidInputError, match="original model"):
            QualityMeter().update(broken, logits(1), torch.arange(12))


def test_wrong_shapes_and_empty_texts_are_refused():
    with pytest.raises(InvalidInputError, match="belong together"):
        QualityMeter().update(logits(1), logits(1)[:5], torch.arange(12))
    with pytest.raises(InvalidInputError, match="no text"):
        QualityMeter().result()


def test_gate():
    quality = Quality(10, 1, 0.2, 0.01, 0.9, 12.0, 11.0)
    quality.require(0.2)
    with pytest.raises(QualityGateError, match="above the limit"):
        quality.require(0.1)
    with pytest.raises(QualityGateError):
        Quality(10, 1, math.nan, 0.01, 0.9, 12.0, 11.0).require(1.0)


def test_json_keys():
    keys = {"tokens", "kl_mean", "kl_se", "top1_agreement", "perplexity", "perplexity_original"}
    assert keys <= set(json.loads(json.dumps(Quality(10, 1, 0.2, 0.01, 0.9, 12.0, 11.0).to_json())))


def test_windows_cover_the_text_once():
    assert [list(w) for w in windows(range(10), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [list(w) for w in windows(range(9), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(w) for w in windows(range(10), 4, max_tokens=6)] == [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(InvalidInputError, match="context 1"):
        list(windows(range(10), 1))


def test_shipped_texts_share_no_document():
    texts = {name: default_text(name) for name in ("eval", "calib")}
    documents = {name: set(text.strip().split("\n\n\n")) for name, text in texts.items()}
    assert all(150_000 < len(text.encode()) < 250_000 for text in texts.values())
    assert not documents["eval"] & documents["calib"]
    with pytest.raises(InvalidInputError, match="train"):
        default_text("train")
