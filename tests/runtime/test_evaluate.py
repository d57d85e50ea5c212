"""Perplexity by the protocol that the shipped models' figures were measured with."""

from __future__ import annotations

import math

import pytest
import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.evaluate import evaluate

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 12


def test_it_is_the_mean_over_windows_less_first_tokens(float_model, tiny_folder):
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = float_model.tokenizer.encode(TEXT, add_special_tokens=False)
    losses = []
    for start in range(0, len(ids), 32):
        window = torch.tensor([ids[start : start + 32]])
        if window.shape[1] > 1:
            with torch.no_grad():
                logits = oracle(window).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    expected = float(torch.cat(losses).double().mean())
    result = evaluate(float_model, TEXT, context=32)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == len(ids)
    assert result.seconds > 0


def test_only_the_first_tokens_are_used(float_model):
    result = evaluate(float_model, TEXT, context=32, max_tokens=65)
    assert result.tokens == 65  # two whole windows, and one token that is not scored
    longer = evaluate(float_model, TEXT, context=32, max_tokens=64)
    assert result.nll == pytest.approx(longer.nll)


@pytest.mark.parametrize(
    "options", [{"context": 1}, {"context": 1 << 20}, {"max_tokens": 1}, {"context": 2.5}]
)
def test_sizes_that_make_no_sense(float_model, options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        evaluate(float_model, TEXT, **options)


def test_a_text_too_short(float_model):
    with pytest.raises(InvalidInputError, match="too short"):
        evaluate(float_model, "")
