"""The engine: pages, batches, scheduling; and that a sequence's tokens do not depend on its company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.batch import Span, StepBatch
from qcompiler.runtime.engine import Engine, NonFiniteLogitsError
from qcompiler.runtime.memory import make_executor
from qcompiler.runtime.model import load
from qcompiler.runtime.pages import PageAllocator
from qcompiler.runtime.sampling import SamplingParams

PROMPTS = [
    "Once upon a time",
    "The",
    "It is a truth universally acknowledged, that a single man",
    "fn main() {",
]


def engine_for(model, **options):
    limits = {"max_sequences": 4, "max_step_tokens": 64, "max_cache_tokens": 1024, **options}
    executor, planned = make_executor(model.program, max_context=model.max_context, **limits)
    return Engine(
        executor,
        vocab_size=model.engine.vocab_size,
        max_context=model.max_context,
        eos_token_ids=model.engine.eos_token_ids,
        max_sequences=planned.max_sequences,
        max_step_tokens=planned.max_step_tokens,
    )


def encode(model, texts=PROMPTS):
    return [model.tokenizer.encode(t) for t in texts]


@pytest.fixture(scope="module")
def alone(float_model):
    """Greedy continuation of each prompt by itself."""
    return [float_model.generate_tokens(p, max_tokens=24).token_ids for p in encode(float_model)]


# Pages


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pages_are_never_given_out_twice(data):
    allocator = PageAllocator(20, 4)
    held = []
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            allocator.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            count = data.draw(st.integers(1, 8))
            pages = allocator.allocate(count)
            if pages is None:
                assert count > allocator.available
            else:
                assert len(pages) == count
                held.append(pages)
        everything = [p for pages in held for p in pages]
        assert len(set(everything)) == len(everything)
        assert len(everything) + allocator.available == 20


def test_neighbouring_pages_are_preferred():
    allocator = PageAllocator(8, 4)
    first, second = allocator.allocate(1), allocator.allocate(3)
    assert (first, second) == ([0], [1, 2, 3])
    allocator.release(first)
    assert allocator.allocate(2) == [4, 5]
    assert allocator.pages_for(1) == 1
    assert allocator.pages_for(9) == 3


def test_releasing_twice_is_an_error():
    allocator = PageAllocator(2, 4)
    pages = allocator.allocate(1)
    allocator.release(pages)
    with pytest.raises(InvalidInputError, match="twice"):
        allocator.release(pages)


# Batches


def test_a_step_laid_end_to_end():
    spans = [Span([10, 11, 12], 0, [5, 2], [2]), Span([13], 4, [7, 3, 9], [0])]
    batch = StepBatch(spans, page_size=2, position_offset=0)
    assert batch.arrays() == {
        "input_ids": [[10, 11, 12, 13]],
        "position_ids": [[0, 1, 2, 4]],
        "logits_rows": [2, 3],
        "slots": [10, 11, 4, 18],
        "block_table": [[5, 2, 0], [7, 3, 9]],
        "query_start": [0, 3, 4],
        "seq_lens": [3, 5],
    }
    assert batch.max_query_len == 3
    assert not batch.is_decode


def test_a_padded_decode_step():
    batch = StepBatch([Span([10], 1, [4], [0])], page_size=2, position_offset=2)
    assert batch.is_decode
    assert batch.arrays(sequences=3, pages=2) == {
        "input_ids": [[10, 0, 0]],
        "position_ids": [[3, 2, 2]],
        "logits_rows": [0, 1, 2],
        "slots": [9, -1, -1],
        "block_table": [[4, 0], [0, 0], [0, 0]],
        "query_start": [0, 1, 1, 1],
        "seq_lens": [2, 0, 0],
    }


def test_padding_changes_no_logits(float_model):
    """What a CUDA graph replays: a decode step padded to more sequences and a wider block table."""
    executor = engine_for(float_model).executor
    prompt = encode(float_model)[0]
    executor.run([Span(prompt, 0, [3], [len(prompt) - 1])])
    span = Span([42], len(prompt), [3], [0])
    plain = executor.run([span])

    from qcompiler.runtime.batch import IndexBuffer

    padded = StepBatch([span], executor.page_size, 0).arrays(sequences=4, pages=8)
    shapes = {k: tuple(torch.tensor(v).shape) for k, v in padded.items()}
    buffer = IndexBuffer(shapes, torch.device("cpu"))
    buffer.fill(padded)
    (logits,) = executor.program({**buffer.tensors, **executor.pages, "max_query_len": 1})
    torch.testing.assert_close(logits[0, :1], plain)
    assert torch.isfinite(logits).all()


# Scheduling


def test_together_equals_alone(float_model, alone):
    together = float_model.generate_tokens(encode(float_model), max_tokens=24)
    assert [g.token_ids for g in together] == alone


@pytest.mark.parametrize("budget", [4, 7, 64])
def test_prompts_in_pieces_equal_whole_prompts(float_model, alone, budget):
    engine = engine_for(float_model, max_step_tokens=budget)
    sequences = [engine.add(p, SamplingParams(max_tokens=24)) for p in encode(float_model)]
    engine.run(sequences)
    assert [s.generated for s in sequences] == alone


def test_sequences_that_come_late_join_a_running_batch(float_model, alone):
    engine = engine_for(float_model)
    sequences = []
    for prompt in encode(float_model):
        sequences.append(engine.add(prompt, SamplingParams(max_tokens=24)))
        for _ in range(3):
            engine.step()
    engine.run(sequences)
    assert [s.generated for s in sequences] == alone


@pytest.mark.parametrize("limit", [{"max_sequences": 1}, {"max_cache_tokens": 48}])
def test_who_does_not_fit_waits(float_model, alone, limit):
    engine = engine_for(float_model, **limit)
    sequences = [engine.add(p, SamplingParams(max_tokens=24)) for p in encode(float_model)]
    engine.step()
    assert engine.waiting
    engine.run(sequences)
    assert [s.generated for s in sequences] == alone
    assert engine.allocator.available == engine.allocator.num_pages


def test_old_contents_of_a_page_do_not_show(float_model, alone):
    engine = engine_for(float_model)
    for pages in engine.executor.pages.values():
        pages.fill_(float("nan"))
    sequences = [engine.add(p, SamplingParams(max_tokens=24)) for p in encode(float_model)]
    engine.run(sequences)
    assert [s.generated for s in sequences] == alone


def test_an_aborted_sequence_gives_its_pages_back(float_model, alone):
    engine = engine_for(float_model)
    kept, dropped, waiting = (engine.add(p, SamplingParams(max_tokens=24)) for p in encode(float_model)[:3])
    engine.step()
    engine.abort(dropped)
    engine.abort(waiting)
    engine.abort(waiting)
    assert dropped.finish_reason == "aborted"
    engine.run([kept])
    assert kept.generated == alone[0]
    assert engine.allocator.available == engine.allocator.num_pages
    assert not engine.step()


# Ends


def test_length_and_context_end_a_sequence(float_model):
    engine = engine_for(float_model, max_cache_tokens=4096)
    prompt = encode(float_model)[0]
    short = engine.add(prompt, SamplingParams(max_tokens=3))
    long = engine.add([5] * (float_model.max_context - 2), SamplingParams(max_tokens=50, ignore_eos=True))
    engine.run([short, long])
    assert (short.finish_reason, len(short.generated)) == ("length", 3)
    assert (long.finish_reason, len(long.tokens)) == ("length", float_model.max_context)


def test_stop_tokens_end_a_sequence(float_model, alone):
    params = SamplingParams(max_tokens=24, stop_token_ids=(alone[0][5],))
    (result,) = float_model.generate_tokens([encode(float_model)[0]], **vars(params))
    assert result.finish_reason == "stop"
    assert result.token_ids == alone[0][: alone[0].index(alone[0][5]) + 1]


def test_the_end_of_text_token_ends_unless_ignored(float_model, alone):
    engine = engine_for(float_model)
    engine.eos_token_ids = (alone[0][3],)
    prompt = encode(float_model)[0]
    ends = engine.add(prompt, SamplingParams(max_tokens=24))
    goes_on = engine.add(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
    engine.run([ends, goes_on])
    assert ends.finish_reason == "stop"
    assert ends.generated[-1] == alone[0][3]
    assert goes_on.generated == alone[0]


# Refusals


def test_prompts_that_cannot_be_served(float_model):
    engine = engine_for(float_model)
    with pytest.raises(InvalidInputError, match="empty"):
        engine.add([], SamplingParams())
    with pytest.raises(InvalidInputError, match="context is 2048"):
        engine.add([1] * 2048, SamplingParams())
    for token in (-1, 2048, 10**12):
        with pytest.raises(InvalidInputError, match="vocabulary"):
            engine.add([1, token], SamplingParams())
    with pytest.raises(InvalidInputError, match="pages"):
        engine.add([1] * 1000, SamplingParams(max_tokens=500))
    assert not engine.waiting


def test_a_cache_that_does_not_fit_memory_is_refused(float_model):
    with pytest.raises(InvalidInputError, match="max_cache_tokens"):
        engine_for(float_model, max_cache_tokens=1 << 40)
    with pytest.raises(InvalidInputError, match="max_sequences"):
        engine_for(float_model, max_sequences=0)


def test_nan_fails_its_own_sequence_only(float_model, alone, monkeypatch):
    engine = engine_for(float_model)
    original = engine.executor.run

    def poisoned(spans):
        logits = original(spans).clone()
        if any(s.start == 0 and len(s.tokens) == 1 for s in spans):
            logits[-1] = float("nan")
        return logits

    monkeypatch.setattr(engine.executor, "run", poisoned)
    good = engine.add(encode(float_model)[0], SamplingParams(max_tokens=24))
    bad = engine.add([7], SamplingParams(max_tokens=24))
    with pytest.raises(NonFiniteLogitsError, match="NaN"):
        engine.run([bad])
    engine.run([good])
    assert good.generated == alone[0]
    assert engine.allocator.available == engine.allocator.num_pages


def test_scores_of_many_windows_equal_each_alone(float_model):
    engine = engine_for(float_model, max_step_tokens=50)
    prompts = [p * k for p, k in zip(encode(float_model), (9, 1, 3, 5), strict=True)]
    got = [torch.zeros(len(p), engine.vocab_size) for p in prompts]
    for index, first, logits in engine.score(prompts):
        got[index][first : first + logits.shape[0]] = logits
    for prompt, logits in zip(prompts, got, strict=True):
        torch.testing.assert_close(logits, float_model.logits(prompt), rtol=1e-4, atol=1e-4)
    assert engine.allocator.available == engine.allocator.num_pages


def test_threads_share_an_engine(float_model, alone):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda p: float_model.generate_tokens(p, max_tokens=24).token_ids, encode(float_model))
        )
    assert results == alone


def test_sampling_does_not_depend_on_the_batch(q4_model):
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 16}
    one = q4_model.generate(PROMPTS[0], **options)
    assert q4_model.generate(PROMPTS, **options)[0] == one
    assert q4_model.generate(PROMPTS[0], **{**options, "seed": 8}) != one


def test_model_limits_reach_the_engine(tiny_float):
    model = load(tiny_float, device="cpu", max_sequences=2, max_step_tokens=16, max_cache_tokens=100)
    assert model.engine.max_sequences == 2
    assert model.engine.max_step_tokens == 16
    assert model.engine.allocator.num_pages == 7
