"""Continuous batching: sequences come and go, every step computes what is due for all of them.

A step first takes one token of each sequence that is generating, then fills
the rest of the token budget with prompts, in pieces if need be (chunked
prefill). A sequence's pages are reserved when it starts, for its prompt and
everything it may generate, so that none runs out midway. On a GPU the next step
is launched before the tokens of the last one are read; see `pipeline`.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import torch

from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.batch import Span
from qcompiler.runtime.executor import Executor
from qcompiler.runtime.pages import PageAllocator
from qcompiler.runtime.pipeline import Flight, launch
from qcompiler.runtime.sampling import SamplerState, SamplingParams

FinishReason = Literal["stop", "length", "aborted"]
# What the fp32 logits of one step of `score` may take.
_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


class NonFiniteLogitsError(QCompilerError):
    """The model computed NaN or nothing but infinities for a sequence."""


@dataclass(eq=False)
class Sequence:
    """One prompt being continued.

    `tokens` holds the prompt and what was generated; see `pipeline.Work`.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    limit: int
    stop_ids: frozenset[int]
    sampler: SamplerState
    watch: Callable[[int], bool] | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    logprobs: int | None = None
    flight: Flight[Sequence] | None = None
    row: int = 0
    finish_reason: FinishReason | None = None
    error: QCompilerError | None = None

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt, a final stop token included."""
        return self.tokens[self.prompt_length :]


class Engine:
    """Generates for many sequences at once; safe to call from several threads.

    Args:
        executor: Runs the steps.
        vocab_size: Token ids lie below this.
        max_context: Most tokens of one sequence.
        eos_token_ids: End a sequence unless it ignores them.
        max_sequences: Most sequences that run at once; more wait.
        max_step_tokens: Most tokens of one step.
        ahead: Launch a step before the tokens of the one before are known; on a GPU when None.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        vocab_size: int,
        max_context: int,
        eos_token_ids: Seq[int] = (),
        max_sequences: int = 64,
        max_step_tokens: int = 2048,
        ahead: bool | None = None,
    ):
        self.executor = executor
        self.ahead = executor.device.type == "cuda" if ahead is None else ahead
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_sequences = max_sequences
        self.max_step_tokens = max(max_step_tokens, max_sequences)
        self.allocator = PageAllocator(executor.num_pages, executor.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._ids = itertools.count()
        self._flight: Flight[Sequence] | None = None
        self.lock = threading.RLock()  # held while a step runs

    def check_tokens(self, tokens: Seq[int], *, room: int = 0) -> None:
        """Raise `InvalidInputError` unless the ids are in the vocabulary and leave `room` in the context."""
        if not tokens:
            raise InvalidInputError("the prompt is empty", hint="Give at least one token.")
        if len(tokens) + room > self.max_context:
            raise InvalidInputError(
                f"the prompt has {len(tokens)} tokens, but the model's context is {self.max_context}"
                + (f" and {room} must be left to generate" if room else ""),
                hint="Shorten the prompt.",
            )
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocab_size:
            raise InvalidInputError(
                f"token id {low if low < 0 else high} is not in the vocabulary of {self.vocab_size}"
            )

    def plan(self, prompt: Seq[int], params: SamplingParams) -> tuple[int, frozenset[int]]:
        """Most tokens that a request may come to, prompt included, and the tokens that end it.

        Raises:
            InvalidInputError: the prompt is empty, too long, or needs more pages than there are.
        """
        self.check_tokens(prompt, room=1)
        limit = min(len(prompt) + params.max_tokens, self.max_context)
        needed = self.allocator.pages_for(limit)
        if needed > self.allocator.num_pages:
            raise InvalidInputError(
                f"{len(prompt)} prompt tokens and up to {limit - len(prompt)} more need {needed} pages of "
                f"the KV cache, which has {self.allocator.num_pages} of {self.allocator.page_size} tokens",
                hint="Lower max_tokens, or load the model with more pages (max_cache_tokens).",
            )
        stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.eos_token_ids)
        )
        return limit, stop_ids

    def add(
        self, prompt: Seq[int], params: SamplingParams, *, watch: Callable[[int], bool] | None = None
    ) -> Sequence:
        """Queue a prompt.

        Args:
            prompt: Token ids.
            params: How to sample and when to stop.
            watch: Called with each generated token that is no stop token; True ends the sequence.

        Raises:
            InvalidInputError: the prompt is empty, too long, or needs more pages than there are.
        """
        limit, stop_ids = self.plan(prompt, params)
        sequence = Sequence(
            id=next(self._ids),
            tokens=list(prompt),
            prompt_length=len(prompt),
            limit=limit,
            stop_ids=stop_ids,
            sampler=SamplerState(params, len(prompt)),
            watch=watch,
        )
        with self.lock:
            self.waiting.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence now and free its pages; does nothing if it has ended."""
        with self.lock:
            if sequence.finish_reason is None:
                self._finish(sequence, "aborted")
                self._drop_unwanted()

    def step(self) -> bool:
        """Launch a step and take the tokens of the one before; False when nothing is left to do."""
        with self.lock:
            work = self._schedule()
            before, self._flight = self._flight, None
            if not work and before is None:
                return False
            try:
                if work:
                    self._flight = launch(self.executor, work, ahead=self.ahead)
            finally:
                if before is not None:
                    self._land(before)
            flight = self._flight
            if flight is not None and flight.blocking:
                self._flight = None
                self._land(flight)
            self._drop_unwanted()
            return True

    def run(self, sequences: Seq[Sequence]) -> None:
        """Step until these sequences have ended.

        Raises:
            QCompilerError: what went wrong with the first of them that failed.
        """
        while any(s.finish_reason is None for s in sequences):
            self.advance()
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error

    def advance(self) -> None:
        """`step`, when something is known to be waiting.

        Raises:
            InvalidInputError: what waits can never start, because its pages are held elsewhere.
        """
        if not self.step():
            with self.lock:
                if self.waiting and not self.running:
                    raise InvalidInputError(
                        f"{self.allocator.available} free pages of the KV cache are too few for a prompt",
                        hint="Finish what holds them, or load the model with more pages (max_cache_tokens).",
                    )

    def score(self, prompts: Seq[Seq[int]]) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Logits of every token of every prompt, computed in ragged steps.

        Yields:
            (index of the prompt, index of a first token, logits [tokens, vocabulary] from there on).
        """
        for prompt in prompts:
            self.check_tokens(prompt)
        room = _LOGITS_BYTES[self.executor.device.type]
        budget = max(1, min(self.max_step_tokens, room // (4 * self.vocab_size)))
        pending = deque((i, list(p)) for i, p in enumerate(prompts))
        active: list[tuple[int, list[int], int, list[int]]] = []  # index, tokens, computed, pages
        try:
            while pending or active:
                with self.lock:
                    if self._flight is not None:  # its tokens on the device are those of the last run
                        before, self._flight = self._flight, None
                        self._land(before)
                    room = budget - sum(len(t) - c for _, t, c, _ in active)
                    while pending and room > 0:
                        pages = self.allocator.allocate(self.allocator.pages_for(len(pending[0][1])))
                        if pages is None:
                            break
                        index, tokens = pending.popleft()
                        active.append((index, tokens, 0, pages))
                        room -= len(tokens)
                    if not active:
                        raise InvalidInputError(
                            f"no pages of the KV cache are free for {len(pending[0][1])} tokens",
                            hint="Wait for running generations, or load the model with max_cache_tokens.",
                        )
                    left, spans, parts = budget, [], []
                    for index, tokens, computed, pages in active:
                        count = min(left, len(tokens) - computed)
                        if count == 0:
                            break
                        left -= count
                        spans.append(Span(tokens[computed : computed + count], computed, pages, range(count)))
                        parts.append((index, computed, count))
                    logits = self.executor.run(spans).clone()
                    rest = []
                    for k, (index, tokens, computed, pages) in enumerate(active):
                        done = computed + (parts[k][2] if k < len(parts) else 0)
                        if done == len(tokens):
                            self.allocator.release(pages)
                        else:
                            rest.append((index, tokens, done, pages))
                    active = rest
                row = 0
                for index, computed, count in parts:
                    yield index, computed, logits[row : row + count]
                    row += count
        finally:
            with self.lock:
                for _, _, _, pages in active:
                    self.allocator.release(pages)

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens in this step."""
        budget = self.max_step_tokens
        work: list[tuple[Sequence, int]] = []
        prompts = []
        for sequence in self.running:
            if sequence.flight is not None:
                if len(sequence.tokens) + 1 < sequence.limit:  # else the token on its way is the last
                    work.append((sequence, 1))
            elif (
                sequence.computed == len(sequence.tokens) - 1 and sequence.computed >= sequence.prompt_length
            ):
                work.append((sequence, 1))
            else:
                prompts.append(sequence)
        budget -= len(work)
        for sequence in prompts:
            if budget > 0:
                count = min(budget, len(sequence.tokens) - sequence.computed)
                work.append((sequence, count))
                budget -= count
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            pages = self.allocator.allocate(self.allocator.pages_for(sequence.limit))
            if pages is None:
                break
            self.waiting.popleft()
            sequence.pages = pages
            self.running.append(sequence)
            count = min(budget, len(sequence.tokens))
            work.append((sequence, count))
            budget -= count
        return work

    def _drop_unwanted(self) -> None:
        """Forget a step on its way if all that it was for have ended."""
        if self._flight is not None and all(s.finish_reason is not None for s in self._flight.work):
            self._flight = None

    def _land(self, flight: Flight[Sequence]) -> None:
        try:
            for sequence, token, _ in flight.land():
                if sequence.finish_reason is None:  # else it was launched before the end was known
                    self._accept(sequence, token)
        except BaseException as e:
            # Without their tokens they cannot go on; other threads that wait for them learn it from them.
            for sequence in flight.work:
                if sequence.finish_reason is None:
                    self._fail(sequence, QCompilerError(f"the step failed: {str(e) or type(e).__name__}"))
            raise

    def _accept(self, sequence: Sequence, token: int) -> None:
        if token < 0:
            error = NonFiniteLogitsError(
                f"the model computed NaN or infinite logits after {len(sequence.tokens)} tokens",
                hint="qrun verify checks the weights; float16 activations can overflow, bfloat16 do not.",
            )
            self._fail(sequence, error)
            return
        sequence.tokens.append(token)
        try:
            stops = token in sequence.stop_ids or (sequence.watch is not None and sequence.watch(token))
        except QCompilerError as e:  # no reason to stop the others of the step
            self._fail(sequence, e)
            return
        if stops:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length")

    def _fail(self, sequence: Sequence, error: QCompilerError) -> None:
        sequence.error = error
        self._finish(sequence, "aborted")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.allocator.release(sequence.pages)
        sequence.pages = []
