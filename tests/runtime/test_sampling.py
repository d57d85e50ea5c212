"""Sampling: transformers' own logits processors are the oracle; draws belong to the request alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.sampling import SamplerState, SamplingParams, _adjust, process, sample


def logits(rows, vocabulary=200, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def oracle(scores, params, history):
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as hf

    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(hf.MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([history]), scores.clone()[None])[0]


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=0.9, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=2.0, top_p=0.01),
    SamplingParams(temperature=1.0, top_k=1000),
]


def test_processors_equal_those_of_transformers_row_by_row():
    scores = logits(len(CASES))
    ours = process(scores, CASES)
    for row, params in enumerate(CASES):
        torch.testing.assert_close(ours[row], oracle(scores[row], params, [1]), rtol=0, atol=0)


def test_repetition_penalty_equals_that_of_transformers():
    scores, history = logits(1), [3, 3, 17, 199, 0]
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    penalized = oracle(scores[0], SamplingParams(temperature=1.0, repetition_penalty=1.7), history)
    assert sample(scores, [SamplerState(params)], [history]) == [int(penalized.argmax())]
    scores[0, 17] = (
        50.0  # the penalty must be able to change the choice, and must not touch the caller's logits
    )
    before = scores.clone()
    chosen = sample(scores, [SamplerState(SamplingParams(repetition_penalty=100.0))], [history])
    assert chosen != [17]
    assert torch.equal(scores, before)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5])
def test_a_vanishing_temperature_is_greedy(temperature):
    scores = logits(3)
    states = [SamplerState(SamplingParams(temperature=temperature, seed=i, top_p=0.9)) for i in range(3)]
    assert sample(scores, states, [[]] * 3) == scores.argmax(-1).tolist()


def test_greedy_is_argmax_in_any_dtype():
    scores = logits(4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = scores.to(dtype)
        states = [SamplerState(SamplingParams()) for _ in range(4)]
        assert sample(rows, states, [[]] * 4) == rows.float().argmax(-1).tolist()


@pytest.mark.parametrize("params", CASES[:5])
def test_a_draw_does_not_depend_on_the_neighbours(params):
    scores = logits(1, seed=3)

    def draws(neighbours):
        state = SamplerState(SamplingParams(**{**vars(params), "seed": 11}))
        others = [SamplerState(SamplingParams(temperature=1.0, top_p=0.5, seed=i)) for i in range(neighbours)]
        rows = torch.cat([logits(neighbours, seed=9), scores]) if neighbours else scores
        return [sample(rows, [*others, state], [[1]] * (neighbours + 1))[-1] for _ in range(20)]

    assert draws(0) == draws(1) == draws(7)
    assert len(set(draws(0))) > 1


def test_draws_follow_the_distribution():
    scores = torch.tensor([[0.0, math.log(2.0), math.log(5.0), -math.inf]])
    state = SamplerState(SamplingParams(temperature=1.0, seed=5))
    counts = torch.zeros(4)
    for _ in range(200):
        for token in sample(scores.expand(20, -1), [state] * 20, [[]] * 20):
            counts[token] += 1
    expected = torch.tensor([1 / 8, 2 / 8, 5 / 8, 0]) * 4000
    chi_square = ((counts - expected)[:3] ** 2 / expected[:3]).sum()
    assert counts[3] == 0
    assert chi_square < 13.8  # p = 0.001 at two degrees of freedom


def test_seed_repeats_and_no_seed_does_not():
    scores = logits(1)

    def draw(seed):
        state = SamplerState(SamplingParams(temperature=1.5, seed=seed))
        return [sample(scores, [state], [[]])[0] for _ in range(12)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_rows_without_a_finite_logit_are_marked():
    scores = logits(4)
    scores[1] = math.nan
    scores[2] = -math.inf
    scores[3, 5] = math.nan
    states = [SamplerState(SamplingParams(temperature=t)) for t in (0.0, 1.0, 0.0, 0.0)]
    chosen = sample(scores, states, [[]] * 4)
    assert chosen[0] >= 0
    assert chosen[1:] == [-1, -1, -1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": math.nan},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": -1},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": math.inf},
        {"max_tokens": 0},
        {"max_tokens": 10**9},
        {"max_tokens": 1e308},
        {"seed": -1},
        {"seed": 1 << 63},
        {"stop": ("",)},
        {"stop": ("x" * 5000,)},
        {"stop": tuple(map(str, range(100)))},
        {"stop": 3},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": ("a",)},
        {"ignore_eos": 1},
        {"no_such_option": 1},
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        SamplingParams.make(**options)


def test_one_stop_string_may_stand_alone():
    assert SamplingParams(stop="END").stop == ("END",)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(0.05, 5),
    st.integers(0, 30),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 2**32),
    st.integers(2, 40),
)
def test_a_sampled_token_is_always_one_that_was_kept(temperature, top_k, top_p, min_p, seed, vocabulary):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    scores = logits(1, vocabulary, seed % 1000)
    kept = process(scores, [params])[0] > -math.inf
    assert kept.any()
    assert kept[sample(scores, [SamplerState(params)], [[]])[0]]


def test_presence_frequency_and_bias_count_generated_tokens_only():
    """z − presence·[count > 0] − frequency·count + bias, over what follows the prompt."""
    logits = torch.zeros(1, 6)
    history = [0, 0, 1, 2, 2, 3]  # the first three are the prompt
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((4, 2.0), (5, -100)))
    sample(logits, [SamplerState(params, prompt_length=3)], [history])
    assert not logits.any()  # what the caller gave stays as it was
    scores = logits.clone()
    _adjust(scores, [SamplerState(params, prompt_length=3)], [history])
    assert scores.tolist() == [[0.0, 0.0, -1.0, -0.75, 2.0, -100.0]]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.1}, {"frequency_penalty": float("nan")}, {"logit_bias": ((1, 101),)},
        {"logit_bias": ((-1, 1),)}, {"logit_bias": ((1, float("nan")),)}, {"logit_bias": (1,)},
        {"logit_bias": tuple((i, 0) for i in range(2000))},
    ],
)  # fmt: skip
def test_penalties_and_biases_out_of_range_are_refused_by_name(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        SamplingParams(**options)
