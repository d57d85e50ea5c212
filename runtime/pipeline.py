"""Steps on their way: the host prepares the next one while the device computes the one before.

A step is launched without knowing the tokens that the step before it leads to: they stay on the device
and feed it by row. The host reads them one step behind, and only then sees who has come to an end; the
token that such a sequence was given too much is thrown away. Steps run in the order in which they were
launched, so pages may change hands as soon as the last step that writes to them has been launched.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Generic, Protocol, TypeVar

import torch

from qcompiler.runtime.batch import Span
from qcompiler.runtime.logprobs import Logprobs, TokenLogprob
from qcompiler.runtime.readback import ReadBack
from qcompiler.runtime.sampling import SamplerState, choose


class Runner(Protocol):
    """What runs steps; see `qcompiler.runtime.executor.Executor`."""

    @property
    def device(self) -> torch.device:
        """Where the logits are."""

    def run(self, spans: list[Span]) -> torch.Tensor:
        """Logits [rows, vocabulary]."""

    def likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens [rows] of the last run's logits."""

    def keep(self, tokens: torch.Tensor) -> None:
        """Keep the tokens [rows] of the last run for the next one."""


class Work(Protocol):
    """A sequence as a step sees it.

    `tokens` are those that the host knows; `computed` counts those that are in the pages, or will be once
    the steps that were launched have run. `flight` is the step that its next token comes from, if the host
    does not know it yet, and `row` that token's place there.
    """

    tokens: list[int]
    pages: list[int]
    computed: int
    sampler: SamplerState
    logprobs: int | None
    flight: Flight[Any] | None
    row: int


W = TypeVar("W", bound=Work)


class Flight(Generic[W]):
    """A step that was launched.

    Attributes:
        work: Whose tokens it computes.
        due: Who gets a token from it, by row.
        blocking: The next step cannot be prepared before this one's tokens are known.
    """

    def __init__(self, work: list[W], due: list[W], device: torch.device, *, blocking: bool):
        self.work = work
        self.due = due
        self.blocking = blocking
        self._device = device
        self._logprobs: Logprobs | None = None
        self._back: ReadBack | None = None

    def send(self, tokens: torch.Tensor | None, logprobs: Logprobs | None) -> None:
        """Let what comes of the step go to the host."""
        self._logprobs = logprobs
        tensors = [] if tokens is None else [tokens]
        self._back = ReadBack([*tensors, *(logprobs.tensors if logprobs is not None else [])], self._device)

    def land(self) -> list[tuple[W, int, TokenLogprob | None]]:
        """Wait for the step; who gets which token, −1 where the logits are not finite.

        Raises:
            RuntimeError: the device failed.
        """
        read = self._back.wait() if self._back is not None else []
        for work in self.due:
            if work.flight is self:
                work.flight = None
        if not self.due:
            return []
        tokens = read[0].tolist()
        logprobs = self._logprobs.values(read[1:]) if self._logprobs is not None else [None] * len(tokens)
        return list(zip(self.due, tokens, logprobs, strict=True))


def launch(runner: Runner, work: Seq[tuple[W, int]], *, ahead: bool) -> Flight[W]:
    """Launch a step and choose its tokens; counts what it computes.

    Args:
        runner: Runs it.
        work: Who computes how many tokens; 1 for who waits for a token of the step before.
        ahead: The next step may be launched before this one's tokens are known.

    Raises:
        QCompilerError: an op failed, or a constraint; nothing has been counted.
        RuntimeError: the device failed, or has too little memory.
    """
    spans: list[Span] = []
    due: list[W] = []
    for item, count in work:
        if item.flight is not None:
            spans.append(Span([0], item.computed, item.pages, [0], feed=item.row))
            due.append(item)
            continue
        stop = item.computed + count
        last = stop == len(item.tokens)
        known = item.tokens[item.computed : stop]
        spans.append(Span(known, item.computed, item.pages, [count - 1] if last else []))
        if last:
            due.append(item)
    blocking = not ahead or any(item.sampler.reads_tokens for item in due)
    flight = Flight([item for item, _ in work], due, runner.device, blocking=blocking)
    if due:
        try:
            _run_and_choose(runner, spans, flight)
        except BaseException:
            for item in due:
                item.sampler.settle(failed=True)
            raise
    else:
        # A graph gathers at least one row: an unfinished prompt's, which nobody looks at.
        end = spans[-1]
        spans[-1] = Span(end.tokens, end.start, end.pages, [len(end.tokens) - 1])
        runner.run(spans)
        flight.send(None, None)
    for item, count in work:
        item.computed += count
    for row, item in enumerate(due):
        item.flight, item.row = flight, row
        item.sampler.settle(failed=False)
    return flight


def _run_and_choose(runner: Runner, spans: list[Span], flight: Flight[W]) -> None:
    due = flight.due
    logits = runner.run(spans)
    if all(item.sampler.plain for item in due):
        tokens = runner.likeliest(logits)
    else:
        tokens = choose(logits, [item.sampler for item in due], [item.tokens for item in due])
    counts = [item.logprobs for item in due]
    wants = any(count is not None for count in counts)
    if not flight.blocking:
        runner.keep(tokens)
    flight.send(tokens, Logprobs(logits, tokens, counts) if wants else None)
