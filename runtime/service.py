"""Generation as a service: submit requests from any thread or event loop, read streams of tokens.

    with Service(load("tiny-llama-hqq-4bit")) as service:
        stream = service.submit(Request(tokens, SamplingParams(max_tokens=50)))
        for event in stream:            # or: async for event in stream
            print(event.text, end="")

One worker thread owns the engine. What crosses between threads is a queue of
new tasks, a queue of cancelled ones, and each stream's own events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.model import Generation, Model
from qcompiler.runtime.sampling import Constraint, SamplingParams
from qcompiler.runtime.scheduler import PREFILL_CHUNK, Counters, DeviceLostError, Scheduler, Task
from qcompiler.runtime.stream import Stream, StreamTimeoutError, Wakes

log = logging.getLogger(__name__)

# How often the worker looks for readers that stand still and requests that take too long.
_SWEEP_SECONDS = 0.25
MAX_LOGPROBS = 20


class OverloadedError(QCompilerError):
    """The queue is full."""


class ClosedError(QCompilerError):
    """The service takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        prompt: Token ids.
        params: How to sample and when to stop.
        logprobs: How many of the likeliest tokens to report at each position beside the chosen one's
            log probability; None reports nothing.
        constraint: What the text must be like; an object of this request alone, as it keeps a state.
    """

    prompt: Seq[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None and (
            type(self.logprobs) is not int or not 0 <= self.logprobs <= MAX_LOGPROBS
        ):
            raise InvalidInputError(f"logprobs must be in [0, {MAX_LOGPROBS}], not {self.logprobs!r}")


class Observer(Protocol):
    """Told of what happens, by the worker thread; must be quick."""

    def first_token(self, seconds: float) -> None:
        """Time from submission to a request's first token."""

    def next_token(self, seconds: float) -> None:
        """Time between two tokens of a request."""

    def finished(self, reason: str) -> None:
        """A request ended: stop, length, aborted or error."""


@dataclass(frozen=True)
class Stats:
    """The service at one moment; pages are those of the KV cache."""

    waiting: int
    running: int
    pages_total: int
    pages_held: int
    pages_cached: int
    counters: Counters


class Service:
    """Continuous batching over a model, for many callers.

    Args:
        model: A decoder. While the service lives its pages belong to it: the model's own generate() has none.
        max_waiting: Most requests that wait for a place; more are refused.
        max_buffered: Events that a stream holds before its sequence waits for the reader; on a GPU one more
            may be on its way by then.
        stall_seconds: How long a sequence waits for its reader before it is given up.
        request_seconds: How long a request may take in all; None sets no bound.
        prefix_cache: Share pages between prompts that begin alike.
        chunked_prefill: Take long prompts in pieces between the steps of others.
        prefill_chunk: Most prompt tokens in a step in which others generate.
        observer: Told of token times and ends.

    Raises:
        InvalidInputError: the model is an encoder, or is generating at the moment.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_waiting: int = 256,
        max_buffered: int = 1024,
        stall_seconds: float = 30.0,
        request_seconds: float | None = None,
        prefix_cache: bool = True,
        chunked_prefill: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
        observer: Observer | None = None,
    ):
        engine = model.engine
        self.model = model
        self.max_waiting = max_waiting
        self.max_buffered = max_buffered
        self._stall_seconds = stall_seconds
        self._request_seconds = request_seconds
        self._observer = observer
        self._tokenizer = model.tokenizer if model.artifact.path("tokenizer.json") else None
        with engine.lock:
            pages = engine.allocator.allocate(engine.allocator.num_pages)
        if pages is None:
            raise InvalidInputError(
                "the model is generating, or another service owns it", hint="Load the model once more."
            )
        self._pages = pages
        self.scheduler = Scheduler(
            engine,
            pages,
            prefix_cache=prefix_cache,
            chunked_prefill=chunked_prefill,
            prefill_chunk=prefill_chunk,
        )
        self._wake = threading.Condition()
        self._inbox: deque[Task] = deque()
        self._cancelled: deque[Task] = deque()
        self._wakes = Wakes()
        self._nudged = False
        self._draining = False
        self._stopping = False
        self.lost: QCompilerError | None = None
        self._swept = 0.0
        self._thread = threading.Thread(target=self._work, name="qcompiler-service", daemon=True)
        self._thread.start()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        """Whether requests are taken: not draining, and the device answers."""
        return self.lost is None and not self._draining and not self._stopping

    def submit(self, request: Request) -> Stream:
        """Queue a request; read its stream.

        Raises:
            InvalidInputError: the prompt is empty or too long, or an option does not fit the model.
            OverloadedError: the queue is full.
            ClosedError: the service is draining or closed.
            DeviceLostError: the device has failed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Seq[Request]) -> list[Stream]:
        """Queue several requests, all or none; see `submit`."""
        streams = []
        for request in requests:
            params = request.params
            if self._tokenizer is None and params.stop:
                raise InvalidInputError("stop strings need a tokenizer, which the artifact does not have")
            stream = Stream(
                self._tokenizer, params.stop, self.max_buffered, wakes=self._wakes, observer=self._observer
            )
            task = self.scheduler.task(
                request.prompt, params, stream, logprobs=request.logprobs, constraint=request.constraint
            )
            stream.attach(task, len(request.prompt), cancel=self._cancel, nudge=self._nudge)
            streams.append(stream)
        with self._wake:
            if self.lost is not None:
                raise DeviceLostError(self.lost.message, hint=self.lost.hint)
            if not self.ready:
                raise ClosedError("the service is shutting down and takes no more requests")
            queued = len(self._inbox) + len(self.scheduler.waiting)
            if queued + len(requests) > self.max_waiting:
                raise OverloadedError(
                    f"{queued} requests wait already, at most {self.max_waiting} may",
                    hint="Try again later.",
                )
            self._inbox.extend(s.task for s in streams)
            self._wake.notify()
        return streams

    def generate(self, request: Request) -> Generation:
        """Submit a request and wait for all of it."""
        with self.submit(request) as stream:
            return stream.result()

    def stats(self) -> Stats:
        """Numbers for monitoring; of one moment only roughly, since nobody stops for them."""
        scheduler = self.scheduler
        pool = scheduler.pool
        return Stats(
            waiting=len(self._inbox) + len(scheduler.waiting),
            running=len(scheduler.running),
            pages_total=pool.total,
            pages_held=pool.held,
            pages_cached=pool.cached,
            counters=scheduler.counters,
        )

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def close(self, timeout: float = 0.0) -> None:
        """Stop: wait up to `timeout` seconds for what runs, abort the rest, give the pages back."""
        self.drain()
        end = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < end and (self._inbox or self.scheduler.busy):
            time.sleep(0.01)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        pages, self._pages = self._pages, []
        with self.model.engine.lock:
            self.model.engine.allocator.release(pages)

    def check(self) -> None:
        """Compare the page accounts with who runs; for a moment when nothing does.

        Raises:
            PageAccountError: a page is leaked, lost or shared wrongly.
        """
        with self._wake:
            self.scheduler.check()

    # The worker's thread

    def _cancel(self, task: Task) -> None:
        with self._wake:
            self._cancelled.append(task)
            self._wake.notify()

    def _nudge(self) -> None:
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def _work(self) -> None:
        idle = True
        try:
            while True:
                with self._wake:
                    while idle and not (self._inbox or self._cancelled or self._nudged or self._stopping):
                        # Sequences that wait for their readers must be looked after now and then.
                        self._wake.wait(_SWEEP_SECONDS if self.scheduler.busy else None)
                        if self.scheduler.busy:
                            break
                    if self._stopping:
                        break
                    self._take()
                idle = not self._step()
                self._wakes.flush()
        except Exception as e:  # the last resort of a thread whose callers wait for it
            log.exception("the service stops")
            self.lost = QCompilerError(f"the service stopped: {type(e).__name__}: {e}")
        finally:
            with self._wake:
                self._stopping = True
                self._take()
                gone = self.lost or ClosedError("the service was closed")
                try:
                    self.scheduler.cancel_all(gone)
                except Exception:  # of an observer; the streams have ended
                    log.exception("told of an end, the observer failed")
            self._wakes.flush()

    def _take(self) -> None:
        self._nudged = False
        while self._inbox:
            self.scheduler.add(self._inbox.popleft())
        while self._cancelled:
            self.scheduler.cancel(self._cancelled.popleft())

    def _step(self) -> bool:
        now = time.monotonic()
        if now - self._swept > _SWEEP_SECONDS:
            self._swept = now
            self._sweep(now)
        try:
            if self.lost is None:
                return self.scheduler.step()
        except DeviceLostError as e:
            log.critical("%s", e.message)
            self.lost = e  # before anybody is told, who may ask again at once
        self.scheduler.cancel_all(self.lost)
        return False

    def _sweep(self, now: float) -> None:
        for task in [*self.scheduler.running, *self.scheduler.waiting]:
            stream = task.sink
            if not isinstance(stream, Stream):
                continue
            if stream.stalled(now) > self._stall_seconds:
                error = f"nobody read the stream for {self._stall_seconds:g} seconds"
                self.scheduler.cancel(task, StreamTimeoutError(error))
            elif self._request_seconds is not None and now - stream.created > self._request_seconds:
                error = f"the request took longer than {self._request_seconds:g} seconds"
                self.scheduler.cancel(task, StreamTimeoutError(error))
