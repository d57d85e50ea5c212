"""The scheduler under any mix of arrivals, cancellations, failures and slow readers.

In place of a model stands a memory: as keys and values do, what it writes to a
token's slot depends on all tokens up to it, and the next token is a function of
all that it reads back through the pages. A page that is shared wrongly, reused
too early or lost shows as a wrong token.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.engine import Engine
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.scheduler import Scheduler

VOCABULARY, CONTEXT, PAGE = 5, 24, 3


def state(before: int, token: int) -> int:
    """What a token's slot holds, by what the slot before it holds."""
    return zlib.crc32(bytes([before, token])) & 0xFF


def next_token(states) -> int:
    """What the model says when it reads these slots."""
    return zlib.crc32(bytes(states)) % VOCABULARY


class Memory:
    """Pages that hold a byte per token, with the interface of an executor."""

    device = torch.device("cpu")
    page_size = PAGE

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.slots = {}
        self.fails = False
        self.steps = []
        self.kept = []

    def run(self, spans):
        if self.fails and len(spans) > 0:
            self.fails = len(spans) > 1  # the step, then the first that is tried alone
            raise RuntimeError("a kernel failed")
        self.steps.append(sum(len(s.tokens) for s in spans))
        written = set()
        for span in spans:
            before = self.slots[slot_of(span, span.start - 1)] if span.start else 0
            tokens = span.tokens if span.feed is None else [self.kept[span.feed]]
            for i, token in enumerate(tokens, span.start):
                slot = slot_of(span, i)
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self.slots[slot] = before = state(before, token)
        rows = []
        for span in spans:
            for row in span.rows:
                length = span.start + row + 1
                states = [self.slots[slot_of(span, i)] for i in range(length)]
                rows.append(torch.nn.functional.one_hot(torch.tensor(next_token(states)), VOCABULARY))
        return torch.stack(rows).float()

    def likeliest(self, logits):
        return logits.argmax(-1)

    def keep(self, tokens):
        self.kept = tokens.tolist()


def slot_of(span, position):
    return span.pages[position // PAGE] * PAGE + position % PAGE


@dataclass
class Reader:
    """Takes tokens; stands still while `busy`."""

    tokens: list = field(default_factory=list)
    reason: str | None = None
    error: Exception | None = None
    busy: bool = False

    def accept(self, token, logprob, *, stops):
        assert self.reason is None
        self.tokens.append(token)
        return False

    def full(self):
        return self.busy

    def end(self, reason, error):
        assert self.reason is None, "ended twice"
        self.reason, self.error = reason, error


def scheduler_with(num_pages, *, max_sequences=4, max_step_tokens=8, ahead=False, **options):
    memory = Memory(num_pages)
    engine = Engine(
        memory,
        vocab_size=VOCABULARY,
        max_context=CONTEXT,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        ahead=ahead,
    )
    return Scheduler(engine, range(num_pages), **options), memory


def expected(prompt, count, stops=()):
    states: list[int] = []
    for token in prompt:
        states.append(state(states[-1] if states else 0, token))
    said = []
    for _ in range(min(count, CONTEXT - len(prompt))):
        said.append(next_token(states))
        if said[-1] in stops:
            break
        states.append(state(states[-1], said[-1]))
    return said


@given(
    data=st.data(),
    num_pages=st.integers(8, 20),
    prefix_cache=st.booleans(),
    chunked=st.booleans(),
    budget=st.integers(4, 16),
    ahead=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_any_mix_leaves_every_token_right_and_every_page_free(
    data, num_pages, prefix_cache, chunked, budget, ahead
):
    scheduler, memory = scheduler_with(
        num_pages, max_step_tokens=budget, prefix_cache=prefix_cache, chunked_prefill=chunked, ahead=ahead
    )
    jobs = []
    actions = ["add", "add", "step", "step", "step", "cancel", "busy", "fail"]
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=60)):
        if action == "add":
            # Few tokens, so that many prompts begin alike.
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
            count = data.draw(st.integers(1, 10))
            stops = data.draw(st.sampled_from([(), (1,), (2, 3)]))
            # A penalty of nothing: the next token waits for those before it to be read.
            reads = data.draw(st.sampled_from([0.0, 0.0, 1e-9]))
            reader = Reader()
            params = SamplingParams(max_tokens=count, stop_token_ids=stops, presence_penalty=reads)
            task = scheduler.task(prompt, params, reader)
            scheduler.add(task)
            jobs.append((expected(prompt, count, stops), reader, task))
        elif action == "step":
            scheduler.step()
        elif action == "fail":
            memory.fails = True
            scheduler.step()
            memory.fails = False
        elif jobs:
            _, reader, task = data.draw(st.sampled_from(jobs))
            if action == "cancel":
                scheduler.cancel(task)
            else:
                reader.busy = not reader.busy
        scheduler.check()
    for _, reader, _ in jobs:
        reader.busy = False
    for _ in range(2000):
        if not scheduler.busy:
            break
        assert scheduler.step(), "somebody waits and nothing moves"
        scheduler.check()
    assert not scheduler.busy
    assert scheduler.pool.held == 0
    assert scheduler.pool.available == num_pages
    if chunked:
        assert max(memory.steps, default=0) <= budget
    for whole, reader, task in jobs:
        if reader.reason in ("length", "stop"):
            assert reader.tokens == whole
            assert (reader.reason == "stop") == (whole[-1] in task.stop_ids)
        else:
            assert reader.reason == "aborted"
            assert reader.tokens == whole[: len(reader.tokens)]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_oldest_is_never_stopped_for_others(ahead):
    scheduler, _ = scheduler_with(8, max_sequences=4, prefix_cache=False, ahead=ahead)
    readers = [Reader() for _ in range(4)]
    tasks = [scheduler.task([i, 1, 1], SamplingParams(max_tokens=20), r) for i, r in enumerate(readers)]
    for task in tasks:
        scheduler.add(task)
    while scheduler.busy:
        scheduler.step()
    assert tasks[0].preemptions == 0
    assert sum(t.preemptions for t in tasks) > 0
    assert [len(r.tokens) for r in readers] == [20] * 4


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failure_ends_one_sequence_and_not_its_neighbours(ahead):
    scheduler, memory = scheduler_with(12, ahead=ahead)
    readers = [Reader(), Reader()]
    for i, reader in enumerate(readers):
        scheduler.add(scheduler.task([i, 1], SamplingParams(max_tokens=4), reader))
    memory.fails = True
    while scheduler.busy:
        scheduler.step()
    assert [r.reason for r in readers] == ["aborted", "length"]
    assert isinstance(readers[0].error, QCompilerError)
    assert scheduler.counters.failures == 1


def test_a_cancelled_task_may_be_cancelled_again():
    scheduler, _ = scheduler_with(12)
    reader = Reader()
    task = scheduler.task([1], SamplingParams(max_tokens=4), reader)
    scheduler.add(task)
    scheduler.cancel(task)
    scheduler.cancel(task)
    assert reader.reason == "aborted"
    assert not scheduler.step()
    with pytest.raises(QCompilerError):
        scheduler.task([], SamplingParams(), reader)


def test_steps_launched_ahead_compute_and_cache_no_less_and_no_more():
    """An answer is a prompt's beginning later on; its pages are found, and no step is launched in vain."""
    found = []
    for ahead in (False, True):
        scheduler, memory = scheduler_with(12, ahead=ahead)
        reader = Reader()
        scheduler.add(scheduler.task([1, 0], SamplingParams(max_tokens=12), reader))
        while scheduler.step():
            pass
        steps = len(memory.steps)
        again = scheduler.task([1, 0, *reader.tokens, 1], SamplingParams(max_tokens=2), Reader())
        scheduler.add(again)
        while scheduler.step():
            pass
        found.append((reader.tokens, steps, len(memory.steps), again.cached_tokens, again.sink.tokens))
    assert found[0] == found[1]
    assert found[0][1] == 12
    assert found[0][3] == 12
