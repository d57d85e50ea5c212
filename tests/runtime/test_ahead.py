"""Steps launched before the tokens of the last are read: the answers, ends and pages of the plain order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qcompiler.runtime import executor as executor_module
from qcompiler.runtime.batch import DecodeRows, IndexBuffer, Span, StepBatch
from qcompiler.runtime.engine import Engine, NonFiniteLogitsError
from qcompiler.runtime.memory import make_executor
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.service import Request, Service

WORDS = ["Once upon a time", "The", "It is a truth universally acknowledged", "fn main() {", "In the"]


def engine_for(model, *, ahead, **options):
    limits = {"max_sequences": 4, "max_step_tokens": 32, "max_cache_tokens": 640, **options}
    executor, planned = make_executor(model.program, max_context=model.max_context, **limits)
    return Engine(
        executor,
        vocab_size=model.engine.vocab_size,
        max_context=model.max_context,
        eos_token_ids=model.engine.eos_token_ids,
        max_sequences=planned.max_sequences,
        max_step_tokens=planned.max_step_tokens,
        ahead=ahead,
    )


def workload(model, seed, count=7):
    """Prompts with all kinds of sampling and ends."""
    chance = random.Random(seed)
    for number in range(count):
        prompt = model.tokenizer.encode(chance.choice(WORDS)) * chance.randint(1, 4)
        options = {"max_tokens": chance.randint(1, 14), "seed": number}
        kind = chance.randrange(6)
        if kind >= 2:
            options["temperature"] = chance.choice([0.5, 1.0, 1.5])
        if kind == 3:
            options |= {"top_k": 20, "top_p": 0.9}
        if kind == 4:
            options |= {"min_p": 0.05, "stop_token_ids": tuple(range(0, 512, 8))}
        if kind == 5 or chance.random() < 0.15:
            options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        if kind == 1:
            options["stop_token_ids"] = tuple(range(3, 256, 4))
        yield prompt, SamplingParams(**options)


def run_engine(model, seed, *, ahead):
    engine = engine_for(model, ahead=ahead)
    chance = random.Random(seed)
    sequences, flights = [], 0
    for prompt, params in workload(model, seed):
        sequences.append(engine.add(prompt, params))
        for _ in range(chance.randint(1, 3)):
            engine.step()
            flights += engine._flight is not None
    aborted = chance.choice(sequences)
    engine.abort(aborted)
    engine.run(sequences)
    assert engine.allocator.available == engine.allocator.num_pages
    assert not engine.step()
    assert ahead or not flights
    return [(s.generated, s.finish_reason) for s in sequences if s is not aborted], flights


@pytest.mark.parametrize("seed", range(5))
def test_an_engine_says_the_same_ahead_and_in_order(float_model, seed):
    (plain, _), (ahead, flights) = (run_engine(float_model, seed, ahead=a) for a in (False, True))
    assert ahead == plain
    assert flights > 0
    assert {reason for _, reason in plain} <= {"stop", "length"}


def test_a_service_says_the_same_ahead_and_in_order(float_model):
    answers, values = [], []
    for ahead in (False, True):
        float_model.engine.ahead = ahead
        try:
            with Service(float_model, prefix_cache=ahead) as service:
                streams = [
                    service.submit(Request(prompt, params, logprobs=number % 3 or None))
                    for number, (prompt, params) in enumerate(workload(float_model, 11, 16))
                ]
                events = [list(stream) for stream in streams]
                service.check()
                assert service.scheduler.pool.held == 0
        finally:
            float_model.engine.ahead = False
        answers.append([[(e.text, e.token, e.finish_reason) for e in stream] for stream in events])
        found = [e.logprob for stream in events for e in stream if e.logprob is not None]
        assert found
        answers[-1].append([[t for t, _ in logprob.top] for logprob in found])
        values.append(torch.tensor([logprob.logprob for logprob in found]))
    assert answers[0] == answers[1]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_stop_strings_and_streams_end_where_they_did(float_model):
    expected = float_model.complete(WORDS, max_tokens=24, stop=["e", "s "])
    pieces = list(float_model.generate(WORDS, stream=True, max_tokens=24))
    float_model.engine.ahead = True
    try:
        assert float_model.complete(WORDS, max_tokens=24, stop=["e", "s "]) == expected
        ahead = list(float_model.generate(WORDS, stream=True, max_tokens=24))
        stream = float_model.generate(WORDS, stream=True, max_tokens=24)
        next(stream)
        stream.close()
        assert float_model.engine._flight is None
        assert float_model.engine.allocator.available == float_model.engine.allocator.num_pages
    finally:
        float_model.engine.ahead = False
    for index in range(len(WORDS)):
        assert "".join(p for i, p in ahead if i == index) == "".join(p for i, p in pieces if i == index)
    assert "stop" in {g.finish_reason for g in expected}


def test_who_is_pre_empted_with_a_token_on_its_way_says_the_same(tiny_float):
    from qcompiler.runtime.model import load

    answers = []
    for ahead in (False, True):
        model = load(tiny_float, "cpu", verify="sizes", max_cache_tokens=96, max_sequences=8)
        model.engine.ahead = ahead
        with Service(model, prefix_cache=False) as service:
            params = [
                SamplingParams(max_tokens=24, temperature=t, seed=i) for i, t in enumerate([0.0, 0.9] * 5)
            ]
            prompts = [model.tokenizer.encode(text) for text in WORDS * 2]
            streams = [service.submit(Request(p, s)) for p, s in zip(prompts, params, strict=True)]
            answers.append([s.result().token_ids for s in streams])
            assert service.stats().counters.preemptions > 0
            service.check()
    assert answers[0] == answers[1]


def test_a_constraint_is_asked_only_when_it_has_seen_every_token(float_model):
    class Even:
        """Even tokens only; counts what it has seen."""

        def __init__(self):
            self.seen, self.asked = 0, 0

        def allowed(self):
            assert self.asked == self.seen
            self.asked += 1
            return torch.arange(float_model.engine.vocab_size) % 2 == 0

        def accept(self, token):
            assert token % 2 == 0
            self.seen += 1
            return self.seen == 9

    float_model.engine.ahead = True
    try:
        with Service(float_model) as service:
            prompt = float_model.tokenizer.encode(WORDS[0])
            free = service.submit(Request(prompt, SamplingParams(max_tokens=30)))
            bound = service.submit(Request(prompt, SamplingParams(max_tokens=30), constraint=Even()))
            assert len(bound.result().token_ids) == 9
            assert free.result().finish_reason is not None
    finally:
        float_model.engine.ahead = False


def test_nan_fails_its_own_sequence_only(float_model, monkeypatch):
    prompts = [float_model.tokenizer.encode(w) for w in WORDS[:2]]
    expected = float_model.generate_tokens(prompts, max_tokens=12)[0].token_ids
    engine = engine_for(float_model, ahead=True)
    run = engine.executor.run

    def poisoned(spans):
        logits = run(spans).clone()
        for row, span in enumerate(spans):
            if span.pages is bad.pages and span.start > 4:
                logits[row] = float("nan")
        return logits

    monkeypatch.setattr(engine.executor, "run", poisoned)
    good, bad = (engine.add(p, SamplingParams(max_tokens=12)) for p in prompts)
    with pytest.raises(NonFiniteLogitsError, match="NaN"):
        engine.run([bad])
    engine.run([good])
    assert good.generated == expected
    assert engine.allocator.available == engine.allocator.num_pages


def test_a_step_that_cannot_be_launched_loses_no_token(float_model, monkeypatch):
    prompt = float_model.tokenizer.encode(WORDS[0])
    expected = float_model.generate_tokens(prompt, max_tokens=12).token_ids
    engine = engine_for(float_model, ahead=True)
    run, calls = engine.executor.run, []

    def fails_once(spans):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("a kernel failed")
        return run(spans)

    monkeypatch.setattr(engine.executor, "run", fails_once)
    sequence = engine.add(prompt, SamplingParams(max_tokens=12))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        engine.run([sequence])
    engine.run([sequence])
    assert sequence.generated == expected


def test_scores_between_steps_disturb_no_token(float_model):
    prompt = float_model.tokenizer.encode(WORDS[0])
    expected = float_model.generate_tokens(prompt, max_tokens=12).token_ids
    engine = engine_for(float_model, ahead=True)
    run = engine.executor.run

    def like_a_graph(spans):
        logits = run(spans)
        engine.executor.keep(engine.executor.likeliest(logits))
        return logits

    engine.executor.run = like_a_graph
    sequence = engine.add(prompt, SamplingParams(max_tokens=12))
    while sequence.finish_reason is None:
        engine.step()
        list(engine.score([[7]]))
    assert sequence.generated == expected


def test_rows_of_the_next_step_are_those_of_the_whole_arrays():
    """Steps written over one another, as sequences come, grow and go."""
    count, width, size = 6, 4, 3
    shapes = {
        "input_ids": (1, count), "position_ids": (1, count), "logits_rows": (count,), "slots": (count,),
        "feeds": (count,), "block_table": (count, width), "query_start": (count + 1,), "seq_lens": (count,),
    }  # fmt: skip
    buffer = IndexBuffer(shapes, torch.device("cpu"))
    rows = DecodeRows(buffer.host_views[0], size, 2)
    chance = random.Random(0)
    live: list[list] = []
    for _ in range(200):
        if live and chance.random() < 0.2:
            live.pop(chance.randrange(len(live)))
        if not live or (len(live) < count and chance.random() < 0.3):
            live.insert(chance.randint(0, len(live)), [chance.randint(0, 4), []])
        for item in live:
            item[0] = min(item[0] + 1, width * size - 1)
            while len(item[1]) * size <= item[0]:
                item[1].append(chance.randrange(50))
        spans = [Span([chance.randrange(9)], at, pages, [0], chance.choice([None, 3])) for at, pages in live]
        rows.write(spans)
        batch = StepBatch(spans, size, 2)
        wanted = batch.arrays(sequences=count, pages=width)
        wanted["feeds"] = (batch.feeds or [-1] * len(spans)) + [-1] * (count - len(spans))
        for name, array in wanted.items():
            np.testing.assert_array_equal(buffer.tensors[name].numpy(), np.array(array), err_msg=name)


@pytest.fixture
def stand_in_graphs(monkeypatch):
    """CUDA graphs on the CPU: what would be captured is computed again at each replay, in the same place."""

    class Nothing:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    for name in ("Stream", "stream", "graph", "CUDAGraph", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    made = []
    build = executor_module._DecodeGraph.__init__

    def remember(self, executor, count, width, pool):
        kept = executor._tokens.clone()
        build(self, executor, count, width, pool)
        executor._tokens.copy_(kept)  # a capture computes nothing
        self.executor = executor
        made.append((count, width))

    @torch.inference_mode()
    def replay(self, spans):
        self._rows[self._buffer.acquire()].write(spans)
        self._buffer.send()
        self._logits.copy_(self.executor._call(self._buffer.tensors, 1))
        self._tokens.copy_(self.executor._greedy_kept(self._logits, self.executor._tokens))
        return self._logits, self._tokens

    monkeypatch.setattr(executor_module._DecodeGraph, "__init__", remember)
    monkeypatch.setattr(executor_module._DecodeGraph, "replay", replay)
    return made


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_captured_steps_hand_their_tokens_on(float_model, stand_in_graphs, ahead, kernels):
    """Padded steps of several sizes and widths, with prompts between them that no graph holds."""
    if kernels:
        pytest.importorskip("triton", reason="Triton is not installed")
    answers = []
    for graphs in (False, True):
        engine = engine_for(float_model, ahead=ahead, max_sequences=5, max_cache_tokens=2048)
        engine.executor._use_graphs = graphs
        engine.executor._token_kernels = graphs and kernels
        chance = random.Random(1)
        sequences = []
        for prompt, params in workload(float_model, 3, 8):
            long = prompt * (30 if len(sequences) == 4 else 1)
            sequences.append(engine.add(long[:140], params))
            for _ in range(chance.randrange(4)):
                engine.step()
        engine.run(sequences)
        answers.append([(s.generated, s.finish_reason) for s in sequences])
    assert answers[0] == answers[1]
    assert len({count for count, _ in stand_in_graphs}) >= 3
    assert len({width for _, width in stand_in_graphs}) == 2


@pytest.mark.parametrize("gpus", [1, 2])
def test_with_several_gpus_steps_are_captured_on_the_one_of_the_model(
    float_model, stand_in_graphs, monkeypatch, gpus
):
    """Torch's own stream for captures belongs to one of them; the same stream each time shares memory."""
    made, used = [], []
    graph = torch.cuda.graph

    def stream(device):
        made.append(device)
        return graph()

    def capture(_graph, _pool, on):
        used.append(on)
        return graph()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    executor = engine_for(float_model, ahead=True).executor
    executor._use_graphs = True
    executor.warm_up([1, 2, 4])
    assert set(made) == {executor.device}
    assert used == [executor._capture_stream] * 3
    assert (executor._capture_stream is None) == (gpus == 1)
