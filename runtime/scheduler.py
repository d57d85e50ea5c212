"""Continuous batching for a service: what each step computes, and who gives way when pages run out.

A step takes one token of every sequence that is generating, then fills the
token budget with prompts in pieces (chunked prefill; Agrawal et al. 2024).
Pages are taken as they are needed. When none is left, the youngest sequence
gives its pages up and is computed again later (pre-emption by recompute;
Kwon et al. 2023). Prompts begin with the pages of earlier ones where the
tokens are the same. One thread calls it.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.batch import Span
from qcompiler.runtime.engine import Engine, FinishReason, NonFiniteLogitsError
from qcompiler.runtime.page_pool import PagePool, page_key
from qcompiler.runtime.sampling import Constraint, SamplerState, SamplingParams, sample

log = logging.getLogger(__name__)

PREFILL_CHUNK = 256


class DeviceLostError(QCompilerError):
    """The device no longer answers; nothing runs on it until the process is started again."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a chosen token, by the model's own logits, and those of the likeliest tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Sink(Protocol):
    """Where a task's tokens go."""

    def accept(self, token: int, logprob: TokenLogprob | None, *, stops: bool) -> bool:
        """Take a token; `stops` says that it ends the sequence. True ends the sequence here."""

    def full(self) -> bool:
        """Whether the reader is so far behind that its sequence should wait."""

    def end(self, reason: FinishReason, error: QCompilerError | None) -> None:
        """No more tokens come."""


@dataclass(eq=False)
class Task:
    """One sequence: `tokens` is the prompt and what was generated, `computed` of them are in `pages`."""

    id: int
    tokens: list[int]
    limit: int
    stop_ids: frozenset[int]
    sampler: SamplerState
    sink: Sink
    logprobs: int | None = None
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finish_reason: FinishReason | None = None


@dataclass
class Counters:
    """What happened since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    failures: int = 0


class Scheduler:
    """Shares an engine's executor and pages among tasks.

    Args:
        engine: Its executor, limits and vocabulary; its own queue must stay unused meanwhile.
        pages: Numbers of the pages to use.
        prefix_cache: Share pages between prompts that begin alike.
        chunked_prefill: Take long prompts in pieces; otherwise a prompt larger than the budget gets a
            step that is as large as it is.
        prefill_chunk: Most prompt tokens in a step in which others generate, as these wait for it; a step
            of prompts alone may have as many as the engine allows.
    """

    def __init__(
        self,
        engine: Engine,
        pages: Seq[int],
        *,
        prefix_cache: bool = True,
        chunked_prefill: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ):
        self.engine = engine
        self.pool = PagePool(pages, engine.executor.page_size)
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self.counters = Counters()
        self._prefix_cache = prefix_cache
        self._chunked = chunked_prefill
        self._prefill_chunk = prefill_chunk
        self._ids = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any task has not ended."""
        return bool(self.running or self.waiting)

    def task(
        self,
        prompt: Seq[int],
        params: SamplingParams,
        sink: Sink,
        *,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> Task:
        """A task that is not queued yet; may be called from any thread.

        Raises:
            InvalidInputError: the prompt is empty, too long, or can never have the pages it may need.
        """
        limit, stop_ids = self.engine.plan(prompt, params)
        sampler = SamplerState(params, len(prompt), constraint)
        return Task(next(self._ids), list(prompt), limit, stop_ids, sampler, sink, logprobs)

    def add(self, task: Task) -> None:
        """Queue a task."""
        self.waiting.append(task)

    def cancel(self, task: Task, error: QCompilerError | None = None) -> None:
        """End a task now and let go of its pages; does nothing if it has ended."""
        if task.finish_reason is None:
            self._finish(task, "aborted", error)

    def cancel_all(self, error: QCompilerError | None) -> None:
        """End every task."""
        for task in [*self.running, *self.waiting]:
            self._finish(task, "aborted", error)

    def check(self) -> None:
        """Raise `PageAccountError` unless exactly the running tasks hold pages."""
        self.pool.check([t.pages for t in [*self.running, *self.waiting]])

    def step(self) -> bool:
        """Compute one step; False when there is nothing that can be computed now.

        Raises:
            DeviceLostError: the device is gone; every task has ended with this error.
        """
        work = self._schedule()
        if not work:
            return False
        self.counters.steps += 1
        self._compute(work)
        return True

    # What to compute

    def _schedule(self) -> dict[Task, int]:
        """Who computes how many tokens in this step."""
        budget = self.engine.max_step_tokens
        work: dict[Task, int] = {}
        # Asked once: a reader may catch up at any moment, in another thread.
        ready = sorted((t for t in self.running if not t.sink.full()), key=lambda t: t.id)
        for task in ready:
            generating = task.computed == len(task.tokens) - 1
            if generating and task in self.running and self._grow(task, work):
                work[task] = 1
        budget -= len(work)
        if work and self._chunked:
            budget = min(budget, self._prefill_chunk)
        for task in ready:
            if task not in work and budget > 0 and task in self.running:
                work[task] = self._piece(task, budget)
                budget -= work[task]
        for task in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.engine.max_sequences:
                break
            if task.sink.full():
                continue
            if not self._admit(task):
                break
            work[task] = self._piece(task, budget)
            budget -= work[task]
        return work

    def _piece(self, task: Task, budget: int) -> int:
        rest = len(task.tokens) - task.computed
        return min(rest, budget) if self._chunked else rest

    def _admit(self, task: Task) -> bool:
        """Give a task the pages of its prompt and start it."""
        matched = self.pool.match(self._prefix_keys(task, len(task.tokens) - 1)) if self._prefix_cache else []
        needed = self.pool.pages_for(len(task.tokens)) - len(matched)
        # Those who run will want pages soon: starting somebody only to stop him again wastes a prompt.
        while self.pool.available < needed + len(self.running):
            idle = [t for t in self.running if t.sink.full()]
            if not idle:
                self.pool.release(matched)
                return False
            self._preempt(idle[-1])
        pages = self.pool.allocate(needed)
        if pages is None:
            self.pool.release(matched)
            return False
        task.pages = matched + pages
        task.published = len(matched)
        task.computed = len(matched) * self.pool.page_size
        if not task.preemptions:
            task.cached_tokens = task.computed
            self.counters.prompt_tokens += len(task.tokens)
            self.counters.cached_tokens += task.computed
        self.waiting.remove(task)
        self.running.append(task)
        return True

    def _grow(self, task: Task, work: dict[Task, int]) -> bool:
        """Make sure that the task's next token has a page; False if it had to give way itself."""
        while self.pool.pages_for(task.computed + 1) > len(task.pages):
            pages = self.pool.allocate(1)
            if pages is not None:
                task.pages.extend(pages)
                continue
            # The oldest never gives way to others, so something always gets done.
            victim = max(self.running, key=lambda t: (t.sink.full(), t.id))
            work.pop(victim, None)
            self._preempt(victim)
            if victim is task:
                return False
        return True

    def _preempt(self, task: Task) -> None:
        self.running.remove(task)
        self.pool.release(task.pages)
        task.pages, task.computed, task.published = [], 0, 0
        task.preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(task)

    def _prefix_keys(self, task: Task, tokens: int) -> list[bytes]:
        """Names of the full pages among the task's first `tokens` tokens."""
        size = self.pool.page_size
        count = tokens // size
        while len(task.keys) < count:
            at = len(task.keys) * size
            before = task.keys[-1] if task.keys else b""
            task.keys.append(page_key(before, task.tokens[at : at + size]))
        return task.keys[:count]

    # Computing it

    def _compute(self, work: dict[Task, int]) -> None:
        try:
            with self.engine.lock:
                due, tokens, logprobs = self._run(work)
        except (QCompilerError, RuntimeError) as e:
            self._failed(work, e)
            return
        for task, count in work.items():
            task.computed += count
            self._publish(task)
        for task, token, logprob in zip(due, tokens, logprobs, strict=True):
            self._accept(task, token, logprob)

    def _run(self, work: dict[Task, int]) -> tuple[list[Task], list[int], list[TokenLogprob | None]]:
        spans, due = [], []
        for task, count in work.items():
            stop = task.computed + count
            last = stop == len(task.tokens)
            rows = [count - 1] if last else []
            spans.append(Span(task.tokens[task.computed : stop], task.computed, task.pages, rows))
            if last:
                due.append(task)
        if not due:
            # A graph gathers at least one row: an unfinished prompt's, which nobody looks at.
            end = spans[-1]
            spans[-1] = Span(end.tokens, end.start, end.pages, [len(end.tokens) - 1])
            self.engine.executor.run(spans)
            return [], [], []
        logits = self.engine.executor.run(spans)
        tokens = sample(logits, [t.sampler for t in due], [t.tokens for t in due])
        return due, tokens, _logprobs(logits, due, tokens)

    def _failed(self, work: dict[Task, int], error: Exception) -> None:
        """Find whose fault it was: each alone, because a step may be repeated, as it writes the same."""
        if self._device_is_lost():
            lost = DeviceLostError(f"the device failed: {error}", hint="Restart the process.")
            self.cancel_all(lost)
            raise lost from error
        if len(work) > 1:
            for task, count in work.items():
                self._compute({task: count})
            return
        (task,) = work
        self.counters.failures += 1
        log.error("a sequence of %d tokens failed: %s", len(task.tokens), error)
        known = isinstance(error, QCompilerError)
        self._finish(task, "aborted", error if known else QCompilerError(f"the step failed: {error}"))  # type: ignore[arg-type]

    def _device_is_lost(self) -> bool:
        device = self.engine.executor.device
        if device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except torch.cuda.OutOfMemoryError:
            return False
        except RuntimeError:
            return True
        return False

    def _publish(self, task: Task) -> None:
        if not self._prefix_cache:
            return
        keys = self._prefix_keys(task, task.computed)
        for i in range(task.published, len(keys)):
            self.pool.publish(task.pages[i], keys[i])
        task.published = len(keys)

    def _accept(self, task: Task, token: int, logprob: TokenLogprob | None) -> None:
        if token < 0:
            self.pool.forget(task.pages)  # whatever is in them should not spread
            self.counters.failures += 1
            error = NonFiniteLogitsError(
                f"the model computed NaN or infinite logits after {len(task.tokens)} tokens",
                hint="qrun verify checks the weights; float16 activations can overflow, bfloat16 do not.",
            )
            self._finish(task, "aborted", error)
            return
        task.tokens.append(token)
        self.counters.generated_tokens += 1
        stops = token in task.stop_ids
        try:
            constraint = task.sampler.constraint
            complete = constraint is not None and not stops and constraint.accept(token)
            stops = task.sink.accept(token, logprob, stops=stops) or stops or complete
        except QCompilerError as e:
            self._finish(task, "aborted", e)
            return
        if stops:
            self._finish(task, "stop", None)
        elif len(task.tokens) >= task.limit:
            self._finish(task, "length", None)

    def _finish(self, task: Task, reason: FinishReason, error: QCompilerError | None) -> None:
        task.finish_reason = reason
        (self.running if task in self.running else self.waiting).remove(task)
        self.pool.release(task.pages)
        task.pages = []
        task.sink.end(reason, error)


def _logprobs(logits: torch.Tensor, due: Seq[Task], tokens: Seq[int]) -> list[TokenLogprob | None]:
    """Log probabilities for the tasks that want them, by the logits before any penalty or temperature."""
    wanted = [i for i, t in enumerate(due) if t.logprobs is not None and tokens[i] >= 0]
    result: list[TokenLogprob | None] = [None] * len(due)
    if not wanted:
        return result
    scores = logits[torch.tensor(wanted, device=logits.device)].float().log_softmax(-1)
    most = max(due[i].logprobs or 0 for i in wanted)
    chosen = scores.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=logits.device)).tolist()
    best = scores.topk(most, dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    for row, i in enumerate(wanted):
        count = due[i].logprobs or 0
        top = tuple(zip(ids[row][:count], values[row][:count], strict=True))
        result[i] = TokenLogprob(chosen[row][0], top)
    return result
