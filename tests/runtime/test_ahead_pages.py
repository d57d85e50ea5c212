"""Captured steps on their way while pages change hands: who gives way, leaves or comes back says the same."""

from __future__ import annotations

import random

import pytest
from test_ahead import WORDS, stand_in_graphs  # noqa: F401  (a fixture)

from qcompiler.runtime.model import load
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.service import Request, Service


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_captured_steps_find_the_pages_of_who_comes_back(tiny_float, stand_in_graphs, prefix_cache):  # noqa: F811
    answers = []
    for graphs in (False, True):
        model = load(tiny_float, "cpu", verify="sizes", max_cache_tokens=144, max_sequences=8, ahead=graphs)
        model.engine.executor._use_graphs = graphs
        chance = random.Random(7)
        with Service(model, prefix_cache=prefix_cache) as service:
            leaving, staying = [], []
            for number, text in enumerate(WORDS * 2):
                prompt = model.tokenizer.encode(text)
                params = SamplingParams(
                    max_tokens=chance.randint(20, 60),
                    temperature=chance.choice([0.0, 0.9]),
                    frequency_penalty=chance.choice([0.0, 0.0, 0.0, 0.5]),
                    seed=number,
                )
                staying.append(service.submit(Request(prompt, params, logprobs=number % 2 or None)))
                leaving.append(service.submit(Request(prompt, SamplingParams(max_tokens=60))))
            for stream in leaving:
                for _ in range(chance.randrange(3)):
                    next(stream)
                stream.cancel()
            answers.append([s.result().token_ids for s in staying])
            assert service.stats().counters.preemptions > 0
            service.check()
            assert service.scheduler.pool.held == 0
    assert answers[0] == answers[1]
    assert len(stand_in_graphs) > 1
