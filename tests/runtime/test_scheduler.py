"""The scheduler and the service: pages are shared, taken back, never lost; tokens depend on none of it."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.engine import NonFiniteLogitsError
from qcompiler.runtime.model import load
from qcompiler.runtime.page_pool import PageAccountError, PagePool, page_key
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.service import ClosedError, OverloadedError, Request, Service
from qcompiler.runtime.stream import StreamTimeoutError

PROMPTS = [
    "Once upon a time",
    "The",
    "It is a truth universally acknowledged, that a single man",
    "fn main() {",
]
NEW = 24


def tokens_of(model, text):
    return model.tokenizer.encode(text)


@pytest.fixture(scope="module")
def alone(float_model):
    return {p: float_model.generate_tokens(tokens_of(float_model, p), max_tokens=NEW) for p in PROMPTS}


@pytest.fixture
def make_service(tiny_float):
    """A service on a model of its own, checked for leaks at the end."""
    made = []

    def make(*, max_sequences=8, max_step_tokens=64, max_cache_tokens=2048, **options):
        model = load(
            tiny_float,
            device="cpu",
            verify="sizes",
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_cache_tokens=max_cache_tokens,
        )
        made.append(Service(model, **options))
        return made[-1]

    yield make
    for service in made:
        wait_until_idle(service)
        service.check()
        assert service.scheduler.pool.held == 0
        service.close()
        allocator = service.model.engine.allocator
        assert allocator.available == allocator.num_pages


def wait_until_idle(service, seconds=30.0):
    end = time.monotonic() + seconds
    while service.stats().waiting or service.stats().running:
        assert time.monotonic() < end, "the service does not come to rest"
        time.sleep(0.01)


def request(service, text, **options):
    return Request(tokens_of(service.model, text), SamplingParams(**{"max_tokens": NEW, **options}))


# Pages


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_pool_accounts_for_every_page(data):
    pool = PagePool(range(12), 4)
    owners = []
    names = [page_key(b"", [i]) for i in range(6)]
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "match", "publish", "release", "forget"]))
        if action == "allocate":
            count, free = data.draw(st.integers(1, 4)), pool.available
            pages = pool.allocate(count)
            assert (pages is None) == (count > free)
            owners.extend([pages] if pages else [])
        elif action == "match":
            found = pool.match(data.draw(st.permutations(names))[:3])
            owners.extend([found] if found else [])
        elif owners:
            pages = data.draw(st.sampled_from(owners))
            if action == "publish":
                pool.publish(pages[0], data.draw(st.sampled_from(names)))
            elif action == "forget":
                pool.forget(pages)
            else:
                owners.remove(pages)
                pool.release(pages)
        pool.check(owners)
    for pages in owners:
        pool.release(pages)
    pool.check([])
    assert pool.available == 12


def test_the_pool_notices_a_leak_and_a_double_release():
    pool = PagePool(range(4), 4)
    pages = pool.allocate(2)
    with pytest.raises(PageAccountError, match="held"):
        pool.check([])
    pool.release(pages)
    with pytest.raises(InvalidInputError, match="not held"):
        pool.release(pages)


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning():
    pool = PagePool(range(3), 2)
    pages = pool.allocate(3)
    keys = [page_key(b"", [1, 2])]
    keys.append(page_key(keys[0], [3, 4]))
    for page, key in zip(pages, keys, strict=False):
        pool.publish(page, key)
    pool.release(pages)
    pool.allocate(2)  # the page without a name, then the last with one
    assert pool.match(keys) == [pages[0]]


# Scheduling


def test_together_equals_alone(make_service, alone):
    service = make_service()
    streams = [service.submit(request(service, p)) for p in PROMPTS * 3]
    for text, stream in zip(PROMPTS * 3, streams, strict=True):
        assert stream.result() == alone[text]


@pytest.mark.parametrize(("chunk", "most"), [(16, 16 + 1), (256, 64)])
def test_others_wait_for_no_more_of_a_prompt_than_a_chunk(make_service, chunk, most):
    """Alone a prompt may fill a step; while somebody generates it is taken in smaller pieces."""
    service = make_service(prefill_chunk=chunk)
    sizes, run = [], service.model.engine.executor.run

    def counted(spans):
        sizes.append(([len(s.tokens) for s in spans if s.start], sum(len(s.tokens) for s in spans)))
        return run(spans)

    service.model.engine.executor.run = counted
    with service.submit(Request([5] * 9, SamplingParams(max_tokens=400, ignore_eos=True))) as first:
        next(first)
        service.generate(Request(list(range(300, 700)), SamplingParams(max_tokens=1)))
    mixed = [total for _, total in sizes[1:] if total > 1]
    assert max(mixed) == most
    assert sum(mixed) - len(mixed) == 400
    sizes.clear()
    service.generate(Request(list(range(800, 1000)), SamplingParams(max_tokens=1)))
    assert [total for _, total in sizes] == [64, 64, 64, 8]


@pytest.mark.parametrize("budget", [8, 16])
@pytest.mark.parametrize("chunked", [True, False])
def test_prompts_in_pieces_equal_whole_prompts(make_service, alone, budget, chunked):
    service = make_service(max_step_tokens=budget, chunked_prefill=chunked)
    streams = [service.submit(request(service, p)) for p in PROMPTS]
    assert [s.result() for s in streams] == [alone[p] for p in PROMPTS]


def test_who_is_pre_empted_says_the_same(make_service, alone):
    """Eight sequences of up to 3 pages each in 6 pages."""
    service = make_service(max_cache_tokens=96, prefix_cache=False)
    streams = [service.submit(request(service, p)) for p in PROMPTS * 2]
    assert [s.result() for s in streams] == [alone[p] for p in PROMPTS * 2]
    assert service.stats().counters.preemptions > 0


def test_pre_emption_does_not_change_what_is_drawn(make_service):
    options = {"temperature": 0.9, "seed": 3}
    roomy, tight = make_service(), make_service(max_cache_tokens=96)
    expected = [roomy.generate(request(roomy, p, **options)).token_ids for p in PROMPTS]
    streams = [tight.submit(request(tight, p, **options)) for p in PROMPTS * 2]
    assert [s.result().token_ids for s in streams] == expected * 2


def test_a_prompt_that_begins_like_another_computes_only_the_rest(make_service, float_model):
    service = make_service()
    page = service.scheduler.pool.page_size
    prompt = [5 + i % 90 for i in range(4 * page)]
    longer = [*prompt, 7, 8, 9]
    params = SamplingParams(max_tokens=8)
    expected = [float_model.generate_tokens(p, max_tokens=8).token_ids for p in (prompt, longer)]
    first, again, other = (service.submit(Request(p, params)) for p in (prompt, [9], [9, 9]))
    assert first.result().token_ids == expected[0]
    again.result(), other.result()
    second, third = service.submit(Request(prompt, params)), service.submit(Request(longer, params))
    assert second.result().token_ids == expected[0]
    assert third.result().token_ids == expected[1]
    # At least one token must be computed, so the last full page of an equal prompt is not shared.
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 3 * page, 4 * page)
    assert service.stats().counters.cached_tokens == 7 * page


def test_a_long_prompt_does_not_stop_the_others(make_service):
    service = make_service(max_step_tokens=16)
    steps = []
    run = service.model.engine.executor.run
    service.model.engine.executor.run = lambda spans: (
        steps.append([len(s.tokens) for s in spans]) or run(spans)
    )
    short = service.submit(Request([5], SamplingParams(max_tokens=40, ignore_eos=True)))
    next(short)
    long = service.submit(Request(list(range(5, 205)), SamplingParams(max_tokens=2)))
    long.result(), short.result()
    assert max(map(sum, steps)) <= 16
    assert sum(len(s) == 2 and s[0] == 1 for s in steps) >= 12


# Streams


def test_text_comes_in_pieces_and_ends_with_a_reason(make_service, alone):
    service = make_service()
    events = list(service.submit(request(service, PROMPTS[0])))
    assert "".join(e.text for e in events) == alone[PROMPTS[0]].text
    assert [e.token for e in events[:-1]] == alone[PROMPTS[0]].token_ids
    assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == alone[PROMPTS[0]].finish_reason


def test_stop_strings_and_stop_tokens(make_service, alone):
    service = make_service()
    whole = alone[PROMPTS[0]]
    middle = whole.text[10:14]
    result = service.generate(request(service, PROMPTS[0], stop=(middle,)))
    assert result.text == whole.text[: whole.text.index(middle)]
    assert result.finish_reason == "stop"
    token = whole.token_ids[4]
    result = service.generate(request(service, PROMPTS[0], stop_token_ids=(token,)))
    assert result.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_logprobs_are_those_of_the_logits(make_service, float_model):
    service = make_service()
    prompt = tokens_of(float_model, PROMPTS[0])
    events = list(service.submit(Request(prompt, SamplingParams(max_tokens=6), logprobs=3)))[:-1]
    logits = float_model.logits(prompt + [e.token for e in events])[len(prompt) - 1 : -1].log_softmax(-1)
    for row, event in zip(logits, events, strict=True):
        assert event.logprob.logprob == pytest.approx(row[event.token].item(), abs=1e-4)
        assert [t for t, _ in event.logprob.top] == row.topk(3).indices.tolist()


def test_an_event_loop_reads_many_streams(make_service, alone):
    service = make_service()

    async def main():
        streams = [service.submit(request(service, p)) for p in PROMPTS * 2]
        return await asyncio.gather(*(s.aresult() for s in streams))

    assert asyncio.run(main()) == [alone[p] for p in PROMPTS * 2]


def test_a_reader_that_falls_behind_holds_up_itself_only(make_service, alone):
    service = make_service(max_buffered=4)
    slow = service.submit(request(service, PROMPTS[2]))
    assert service.generate(request(service, PROMPTS[0])) == alone[PROMPTS[0]]
    time.sleep(0.3)
    assert len(slow._events) == 4
    assert slow.result() == alone[PROMPTS[2]]


def test_a_reader_that_stands_still_is_given_up(make_service):
    service = make_service(max_buffered=4, stall_seconds=0.1)
    stream = service.submit(request(service, PROMPTS[0]))
    wait_until_idle(service)
    with pytest.raises(StreamTimeoutError, match="nobody read"):
        stream.result()


def test_who_waits_for_a_reader_gives_his_pages_to_others(make_service, alone):
    service = make_service(max_cache_tokens=48, max_buffered=4)
    slow = service.submit(request(service, PROMPTS[2]))
    while not slow.full():
        time.sleep(0.01)
    assert service.generate(request(service, PROMPTS[2])) == alone[PROMPTS[2]]
    assert slow.result() == alone[PROMPTS[2]]


# Ends and faults


def test_a_full_queue_refuses_all_or_none(make_service):
    service = make_service(max_sequences=1, max_waiting=2)
    running = service.submit(request(service, PROMPTS[0], max_tokens=200, ignore_eos=True))
    next(running)
    waiting = service.submit(request(service, PROMPTS[1]))
    with pytest.raises(OverloadedError, match="wait"):
        service.submit_all([request(service, p) for p in PROMPTS[:2]])
    assert service.stats().waiting == 1
    for stream in (running, waiting):
        stream.cancel()


def test_requests_that_make_no_sense_are_refused_at_once(make_service):
    service = make_service()
    for prompt in ([], [1] * 2048, [-1], [10**12]):
        with pytest.raises(InvalidInputError):
            service.submit(Request(prompt, SamplingParams()))
    with pytest.raises(InvalidInputError, match="logprobs"):
        Request([1], SamplingParams(), logprobs=2048)
    assert service.stats().waiting == 0


def test_a_failing_step_fails_only_whose_fault_it_is(make_service, alone):
    service = make_service()
    run = service.model.engine.executor.run

    def faulty(spans):
        if any(666 in s.tokens for s in spans):
            raise RuntimeError("kernel failed")
        return run(spans)

    service.model.engine.executor.run = faulty
    streams = [service.submit(request(service, p)) for p in PROMPTS]
    bad = service.submit(Request([666], SamplingParams()))
    with pytest.raises(QCompilerError, match="kernel failed"):
        bad.result()
    assert [s.result() for s in streams] == [alone[p] for p in PROMPTS]
    assert service.ready


def test_nan_fails_its_own_sequence_and_is_not_shared(make_service):
    service = make_service()
    run = service.model.engine.executor.run
    service.model.engine.executor.run = lambda spans: torch.full_like(run(spans), float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        service.generate(Request([5] * 40, SamplingParams()))
    assert service.stats().pages_cached == 0
    service.model.engine.executor.run = run


def test_a_worker_that_breaks_tells_everybody(make_service):
    service = make_service()
    service.scheduler._schedule = lambda: 1 / 0
    with pytest.raises(QCompilerError, match="ZeroDivisionError"):
        service.generate(request(service, PROMPTS[0]))
    assert not service.ready
    with pytest.raises(QCompilerError):
        service.submit(request(service, PROMPTS[0]))


def test_draining_finishes_what_runs(make_service, alone):
    service = make_service()
    stream = service.submit(request(service, PROMPTS[0]))
    service.drain()
    with pytest.raises(ClosedError):
        service.submit(request(service, PROMPTS[1]))
    assert stream.result() == alone[PROMPTS[0]]


def test_closing_ends_what_runs(tiny_float):
    model = load(tiny_float, device="cpu", verify="sizes")
    with Service(model) as service:
        stream = service.submit(Request([5], SamplingParams(max_tokens=1000, ignore_eos=True)))
        with pytest.raises(InvalidInputError, match="owns it"):
            Service(model)
        with pytest.raises(InvalidInputError, match="pages"):
            model.generate("Hello")
    with pytest.raises(ClosedError):
        stream.result()
    assert model.generate("Hello", max_tokens=2)


def test_no_page_is_lost_among_cancellations(make_service, alone):
    service = make_service(max_cache_tokens=160)
    chance = random.Random(0)
    wrong = []

    def client(seed):
        mine = random.Random(seed)
        for _ in range(6):
            text = mine.choice(PROMPTS)
            with service.submit(request(service, text)) as stream:
                if mine.random() < 0.5:
                    for _ in range(mine.randrange(NEW)):
                        next(stream, None)
                    stream.cancel()
                elif stream.result() != alone[text]:
                    wrong.append(text)

    threads = [threading.Thread(target=client, args=(chance.random(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.parametrize("stop", [(), ("no such text",)])
def test_a_late_reader_gets_all_at_once(make_service, alone, stop):
    """Text is made where it is read, or by the worker where stop strings are looked for: it is the same."""
    service = make_service()

    async def main():
        stream = service.submit(request(service, PROMPTS[0], stop=stop))
        while stream.finish_reason is None:
            await asyncio.sleep(0.01)
        events = await stream.read()
        return events, await stream.read()

    events, rest = asyncio.run(main())
    assert (len(events), rest) == (NEW + 1, [])
    assert "".join(e.text for e in events) == alone[PROMPTS[0]].text
    assert events[-1].finish_reason == "length"


def test_one_call_wakes_all_readers_of_a_loop(make_service, alone, monkeypatch):
    service = make_service()
    calls = []

    async def main():
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: (calls.append(a), call(*a))[1])
        streams = [service.submit(request(service, p)) for p in PROMPTS]
        return await asyncio.gather(*(s.aresult() for s in streams))

    assert asyncio.run(main()) == [alone[p] for p in PROMPTS]
    assert len(calls) <= service.stats().counters.steps + len(PROMPTS)


def test_text_that_cannot_be_made_ends_its_own_sequence(make_service, alone):
    service = make_service()
    stream = service.submit(request(service, PROMPTS[0], max_tokens=400, ignore_eos=True))

    def fails(ids):
        raise QCompilerError("the tokenizer failed")

    stream._text.add = fails
    other = service.submit(request(service, PROMPTS[1]))
    with pytest.raises(QCompilerError, match="tokenizer failed"):
        next(stream)
    with pytest.raises(QCompilerError, match="tokenizer failed"):
        next(stream)
    assert stream.finish_reason == "aborted"
    assert other.result() == alone[PROMPTS[1]]
    wait_until_idle(service, 5)
    assert service.stats().counters.generated_tokens < 400
