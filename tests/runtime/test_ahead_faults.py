"""What goes wrong while a step is on its way: everybody is told, nobody waits for ever, no page is lost."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from test_scheduler_random import Reader, expected, scheduler_with

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.engine import Engine
from qcompiler.runtime.model import load
from qcompiler.runtime.readback import ReadBack
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.scheduler import DeviceLostError
from qcompiler.runtime.service import ClosedError, Request, Service

WORDS = ["Once upon a time", "The", "It is a truth universally acknowledged"]


@pytest.fixture
def reads(monkeypatch):
    """The reads of steps' tokens: those whose number is in `bad` fail, as after a fault of the device."""
    wait = ReadBack.wait

    state = SimpleNamespace(bad=(), count=0)

    def faulty(self):
        state.count += 1
        if state.count in state.bad:
            raise RuntimeError("the read failed")
        return wait(self)

    monkeypatch.setattr(ReadBack, "wait", faulty)
    return state


def small_engine(num_pages=12):
    scheduler, _ = scheduler_with(num_pages, ahead=True)
    return scheduler.engine


@pytest.mark.parametrize("bad", range(1, 6))
def test_a_read_that_fails_ends_every_sequence_of_its_step(reads, bad):
    """Two threads share an engine; the failure shows in one, and the other must not wait for a lost token."""
    engine = small_engine()
    mine = engine.add([1, 0], SamplingParams(max_tokens=9))
    other = engine.add([0, 1, 1], SamplingParams(max_tokens=bad))
    reads.bad = {bad}
    with pytest.raises(RuntimeError, match="the read failed"):
        engine.run([mine])
    done = []

    def run():
        try:
            engine.run([other])
        except QCompilerError as e:
            done.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "the other thread waits for ever"
    assert "the read failed" in done[0].message
    with pytest.raises(QCompilerError, match="the read failed"):
        engine.run([mine])
    assert engine.allocator.available == engine.allocator.num_pages
    again = engine.add([1, 0], SamplingParams(max_tokens=9))
    engine.run([again])
    assert again.generated == expected([1, 0], 9)


@pytest.mark.parametrize("bad", range(1, 8))
def test_a_read_that_fails_in_a_service_leaves_later_requests_right(reads, bad):
    scheduler, _ = scheduler_with(10, ahead=True)
    readers = [Reader() for _ in range(3)]
    for i, reader in enumerate(readers):
        scheduler.add(scheduler.task([i, 1, 1, 0], SamplingParams(max_tokens=6), reader))
    reads.bad = {bad}
    for _ in range(200):
        if not scheduler.step() and not scheduler.busy:
            break
        scheduler.check()
    assert not scheduler.busy
    assert {r.reason for r in readers} <= {"aborted", "length"}
    assert any("the read failed" in str(r.error) for r in readers)
    for i, reader in enumerate(readers):
        assert reader.tokens == expected([i, 1, 1, 0], 6)[: len(reader.tokens)]
    later = Reader()
    scheduler.add(scheduler.task([0, 1, 1, 0], SamplingParams(max_tokens=6), later))
    while scheduler.step():
        scheduler.check()
    assert later.tokens == expected([0, 1, 1, 0], 6)


def test_a_step_that_fails_after_drawing_changes_no_seeded_answer():
    answers = []
    for fails in (False, True):
        scheduler, memory = scheduler_with(12, ahead=True)
        run, keep = memory.run, memory.keep
        memory.run = lambda spans, run=run: run(spans) * 0.5  # no sure thing, so that draws matter
        calls = []

        def failing(tokens, keep=keep, calls=calls, fails=fails):
            calls.append(1)
            if fails and len(calls) == 3:
                raise RuntimeError("no memory")
            keep(tokens)

        memory.keep = failing
        readers = [Reader() for _ in range(2)]
        for seed, reader in enumerate(readers):
            params = SamplingParams(max_tokens=10, temperature=1.0, seed=seed)
            scheduler.add(scheduler.task([seed, 1], params, reader))
        while scheduler.step():
            scheduler.check()
        assert len(calls) > 3
        answers.append([r.tokens for r in readers])
    assert answers[0] == answers[1]


@pytest.fixture
def ahead_service(tiny_float):
    """A service that launches ahead, on a model of its own."""
    model = load(tiny_float, "cpu", verify="sizes", max_sequences=4, max_cache_tokens=512, ahead=True)
    return Service(model)


def wait_for_tokens(stream, count=3):
    events = [next(stream) for _ in range(count)]
    assert all(e.token is not None for e in events)


def open_ended(service, text):
    tokens = service.model.tokenizer.encode(text)
    return service.submit(Request(tokens, SamplingParams(max_tokens=100, ignore_eos=True)))


def test_a_worker_that_breaks_with_a_step_on_its_way_tells_every_stream(ahead_service):
    streams = [open_ended(ahead_service, text) for text in WORDS]
    wait_for_tokens(streams[0])
    ahead_service.model.engine.executor.likeliest = lambda logits: 1 / 0
    for stream in streams:
        with pytest.raises(QCompilerError, match="ZeroDivisionError"):
            stream.result()
    assert not ahead_service.ready
    with pytest.raises(QCompilerError, match="ZeroDivisionError"):
        open_ended(ahead_service, WORDS[0])
    ahead_service.close()
    allocator = ahead_service.model.engine.allocator
    assert allocator.available == allocator.num_pages


class Clumsy:
    """An observer that cannot bear ends."""

    def first_token(self, seconds):
        pass

    def next_token(self, seconds):
        pass

    def finished(self, reason):
        raise ValueError(reason)


@pytest.mark.parametrize("closed", [True, False])
def test_an_observer_that_fails_leaves_no_stream_waiting(tiny_float, closed):
    model = load(tiny_float, "cpu", verify="sizes", max_sequences=4, max_cache_tokens=512, ahead=True)
    service = Service(model, observer=Clumsy())
    streams = [open_ended(service, text) for text in WORDS]
    if closed:
        wait_for_tokens(streams[0])
        threading.Thread(target=service.close).start()
    else:  # one ends by itself: its observer breaks the worker, which tells the others
        tokens = model.tokenizer.encode("The")
        service.submit(Request(tokens, SamplingParams(max_tokens=1, ignore_eos=True)))
    for stream in streams:
        with pytest.raises(QCompilerError):
            stream.result()
    service.close()
    assert model.engine.allocator.available == model.engine.allocator.num_pages


@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_device_lost_with_a_step_on_its_way_tells_every_stream(ahead_service, reads, where):
    scheduler, executor = ahead_service.scheduler, ahead_service.model.engine.executor
    waiting = [open_ended(ahead_service, text) for text in WORDS * 3]  # more than run at once
    wait_for_tokens(waiting[0])
    scheduler._device_is_lost = lambda: True

    def failing(_spans):
        raise RuntimeError("an illegal address")

    if where == "launch":
        executor.run = failing
    else:
        reads.bad = range(1000)
    for stream in waiting:
        with pytest.raises(DeviceLostError, match="the device failed"):
            stream.result()
    assert not ahead_service.ready
    with pytest.raises(DeviceLostError):
        open_ended(ahead_service, WORDS[0])
    ahead_service.check()
    assert scheduler.pool.held == 0
    ahead_service.close()


def test_draining_with_a_step_on_its_way_finishes_every_answer(ahead_service):
    streams = [open_ended(ahead_service, text) for text in WORDS * 2]
    wait_for_tokens(streams[0])
    closing = threading.Thread(target=ahead_service.close, kwargs={"timeout": 60})
    closing.start()
    results = [s.result() for s in streams]
    closing.join(30)
    assert not closing.is_alive()
    assert [(len(g.token_ids), g.finish_reason) for g in results] == [(100, "length")] * 6
    allocator = ahead_service.model.engine.allocator
    assert allocator.available == allocator.num_pages


def test_who_leaves_with_a_step_on_its_way_gives_its_pages_to_others(tiny_float):
    """Answers of others are the same, whoever leaves when; the cache is too small for all of them."""
    model = load(tiny_float, "cpu", verify="sizes", max_sequences=6, max_cache_tokens=160, ahead=True)
    prompts = [model.tokenizer.encode(text) for text in WORDS]
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=5)
    alone = [model.generate_tokens(p, max_tokens=20, temperature=0.8, seed=5).token_ids for p in prompts]
    with Service(model) as service:
        for round_ in range(6):
            leaving = [service.submit(Request(p, SamplingParams(max_tokens=60))) for p in prompts]
            staying = [service.submit(Request(p, params, logprobs=1)) for p in prompts]
            for i, stream in enumerate(leaving):
                for _ in range((round_ + i) % 4):
                    next(stream)
                stream.cancel()
            assert [s.result().token_ids for s in staying] == alone
            for stream in leaving:
                assert stream.result().finish_reason in ("aborted", "stop", "length")
        service.check()
        assert service.scheduler.pool.held == 0


def test_closing_with_a_step_on_its_way_leaves_the_model_usable(ahead_service):
    model = ahead_service.model
    prompt = model.tokenizer.encode(WORDS[0])
    streams = [open_ended(ahead_service, text) for text in WORDS]
    wait_for_tokens(streams[0])
    ahead_service.close()
    for stream in streams:
        with pytest.raises(ClosedError):
            stream.result()
    engine = Engine(
        model.engine.executor, vocab_size=model.engine.vocab_size, max_context=model.max_context, ahead=False
    )
    plain = engine.add(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    engine.run([plain])
    assert model.generate_tokens(prompt, max_tokens=12, ignore_eos=True).token_ids == plain.generated
    with Service(model) as again:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        assert again.generate(Request(prompt, params)).token_ids == plain.generated


def test_the_last_token_of_the_context_is_the_same_ahead(tiny_float):
    """Neither is a token lost at the limit nor a position beyond it computed."""
    answers = []
    for ahead in (False, True):
        model = load(tiny_float, "cpu", verify="sizes", max_sequences=4, max_cache_tokens=8192, ahead=ahead)
        run, most = model.engine.executor.run, []

        def watched(spans, run=run, most=most):
            most.append(max(s.start + len(s.tokens) for s in spans))
            return run(spans)

        model.engine.executor.run = watched
        context = model.max_context
        prompts = [[5 + i % 50 for i in range(context - short)] for short in (1, 2, 5)]
        with Service(model) as service:
            params = SamplingParams(max_tokens=50, ignore_eos=True)
            streams = [service.submit(Request(p, params)) for p in prompts]
            found = [s.result() for s in streams]
            service.check()
        assert [g.finish_reason for g in found] == ["length"] * 3
        assert [len(g.token_ids) for g in found] == [1, 2, 5]
        assert max(most) == context - 1
        answers.append([g.token_ids for g in found])
    assert answers[0] == answers[1]


def test_stop_strings_leak_nothing_of_the_step_on_its_way(tiny_float):
    events = []
    for ahead in (False, True):
        model = load(tiny_float, "cpu", verify="sizes", max_sequences=4, max_cache_tokens=2048, ahead=ahead)
        with Service(model) as service:
            params = SamplingParams(max_tokens=40, stop=("sun", "e s"), temperature=0.7, seed=3)
            prompts = [model.tokenizer.encode(text) for text in WORDS]
            streams = [service.submit(Request(p, params, logprobs=2)) for p in prompts]
            found = [list(stream) for stream in streams]
        events.append([[(e.text, e.token, e.finish_reason) for e in es] for es in found])
    assert events[0] == events[1]
    assert any(es[-1][2] == "stop" for es in events[0])
