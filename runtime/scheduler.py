"""Continuous batching for a service: what each step computes, and who gives way when pages run out.

A step takes one token of every sequence that is generating, then fills the
token budget with prompts in pieces (chunked prefill; Agrawal et al. 2024).
Pages are taken as they are needed. When none is left, the youngest sequence
gives its pages up and is computed again later (pre-emption by recompute;
Kwon et al. 2023). Prompts begin with the pages of earlier ones where the
tokens are the same. One thread calls it. On a GPU the next step is launched before
the tokens of the last one are read; see `pipeline`.
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
from qcompiler.runtime.engine import Engine, FinishReason, NonFiniteLogitsError
from qcompiler.runtime.logprobs import TokenLogprob
from qcompiler.runtime.page_pool import PagePool, page_key
from qcompiler.runtime.pipeline import Flight, launch
from qcompiler.runtime.sampling import Constraint, SamplerState, SamplingParams

log = logging.getLogger(__name__)

PREFILL_CHUNK = 256


class DeviceLostError(QCompilerError):
    """The device no longer answers; nothing runs on it until the process is started again."""


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
    """One sequence: `tokens` is the prompt and what was generated; see `pipeline.Work`."""

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
    flight: Flight[Task] | None = None
    row: int = 0
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
        self._flight: Flight[Task] | None = None

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
        """End every task; what a sink raises comes after all have been told."""
        raised: list[Exception] = []
        for task in [*self.running, *self.waiting]:
            try:
                self._finish(task, "aborted", error)
            except Exception as e:
                raised.append(e)
        if raised:
            raise raised[0]

    def check(self) -> None:
        """Raise `PageAccountError` unless exactly the running tasks hold pages."""
        self.pool.check([t.pages for t in [*self.running, *self.waiting]])

    def step(self) -> bool:
        """Launch a step and take the tokens of the one before; False when there is nothing to do now.

        Raises:
            DeviceLostError: the device is gone; no task can go on, and `cancel_all` tells them.
        """
        work = self._schedule()
        before, self._flight = self._flight, None
        if not work and before is None:
            return False
        failure = None
        if work:
            self.counters.steps += 1
            try:
                self._flight = self._launch(work, ahead=self.engine.ahead)
            except (QCompilerError, RuntimeError) as e:
                failure = e
        if before is not None:
            self._land(before)
        if failure is not None:
            self._failed(work, failure)
        flight = self._flight
        if flight is not None and flight.blocking:
            self._flight = None
            self._land(flight)
        elif flight is not None and all(t.finish_reason is not None for t in flight.work):
            self._flight = None  # nobody wants what comes of it
        return True

    # What to compute

    def _schedule(self) -> dict[Task, int]:
        """Who computes how many tokens in this step."""
        budget = self.engine.max_step_tokens
        work: dict[Task, int] = {}
        # Asked once: a reader may catch up at any moment, in another thread.
        ready = sorted((t for t in self.running if not t.sink.full()), key=lambda t: t.id)
        for task in ready:
            if task.flight is not None:
                generating = len(task.tokens) + 1 < task.limit  # else the token on its way is the last
            else:
                generating = task.computed == len(task.tokens) - 1
            if generating and task in self.running and self._grow(task, work):
                work[task] = 1
        budget -= len(work)
        if work and self._chunked:
            budget = min(budget, self._prefill_chunk)
        for task in ready:
            if task.flight is None and task not in work and budget > 0 and task in self.running:
                work[task] = self._piece(task, budget)
                budget -= work[task]
        for task in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.engine.max_sequences:
                break
            if task.sink.full():
                continue
            if task.flight is not None or not self._admit(task):  # it has given way with a token on its way
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

    def _launch(self, work: dict[Task, int], *, ahead: bool) -> Flight[Task]:
        with self.engine.lock:
            return launch(self.engine.executor, list(work.items()), ahead=ahead)

    def _land(self, flight: Flight[Task]) -> None:
        """Give out the tokens of a step."""
        try:
            found = flight.land()
        except RuntimeError as e:
            self._check_device(e)
            self.counters.failures += 1
            error = QCompilerError(f"the step failed: {e}")
            for task in flight.work:
                self.cancel(task, error)
            return
        for task in flight.work:
            self._publish(task)
        for task, token, logprob in found:
            if task.finish_reason is None:  # else the step was launched before the end was known
                self._accept(task, token, logprob)

    def _failed(self, work: dict[Task, int], error: Exception) -> None:
        """Find whose fault it was: each alone, because a step may be repeated, as it writes the same."""
        self._check_device(error)
        tasks = [task for task in work if task.finish_reason is None]
        if len(work) > 1:
            for task in tasks:
                alone = {task: work[task]}
                try:
                    flight = self._launch(alone, ahead=False)
                except (QCompilerError, RuntimeError) as e:
                    self._failed(alone, e)
                else:
                    self._land(flight)
            return
        for task in tasks:
            self.counters.failures += 1
            log.error("a sequence of %d tokens failed: %s", len(task.tokens), error)
            known = isinstance(error, QCompilerError)
            self._finish(task, "aborted", error if known else QCompilerError(f"the step failed: {error}"))  # type: ignore[arg-type]

    def _check_device(self, error: Exception) -> None:
        if self._device_is_lost():
            raise DeviceLostError(f"the device failed: {error}", hint="Restart the process.") from error

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
        if not self._prefix_cache or task.finish_reason is not None:
            return
        keys = self._prefix_keys(task, min(task.computed, len(task.tokens)))
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
