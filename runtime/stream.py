"""What comes of a request, token by token, read from a thread or from an event loop.

The worker thread writes events and the reader takes them. The buffer between
them is bounded: when it is full, the sequence waits for its reader. All that can
be left to the reader is: each step waits for what the worker does per token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.engine import FinishReason
from qcompiler.runtime.logprobs import TokenLogprob
from qcompiler.runtime.model import Generation
from qcompiler.runtime.scheduler import Task
from qcompiler.runtime.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from qcompiler.runtime.service import Observer


class StreamTimeoutError(QCompilerError):
    """A request took too long, or nobody read what came of it."""


@dataclass(frozen=True)
class Event:
    """One token, or the end.

    Attributes:
        text: What is certain of the text by now; may be empty, as half a character is held back.
        token: The token's id; None in the last event.
        logprob: Its log probability, if asked for.
        finish_reason: Set in the last event.
    """

    text: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


# An event before its text is made: text, token, log probability, finish reason, whether the token gives text.
_Raw = tuple[str, int | None, TokenLogprob | None, FinishReason | None, bool]


class Wakes:
    """Readers in event loops that there is news for; woken together, as each call is a system call.

    One thread adds and flushes.
    """

    def __init__(self) -> None:
        self._due: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[None], Stream]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], stream: Stream) -> None:
        """Wake the stream's reader at the next flush."""
        self._due.setdefault(loop, []).append((future, stream))

    def flush(self) -> None:
        """Wake all that were added."""
        due, self._due = self._due, {}
        for loop, readers in due.items():
            try:
                loop.call_soon_threadsafe(_wake, [future for future, _ in readers])
            except RuntimeError:  # the loop is closed, so nobody reads any more
                for _, stream in readers:
                    stream.cancel()


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Stream:
    """Events of one request; iterate over it, plainly or with `async for`, in one place only.

    Leaving the `with` block, or `cancel`, ends the request wherever it is.
    """

    task: Task

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Seq[str],
        max_buffered: int,
        *,
        wakes: Wakes,
        observer: Observer | None = None,
    ):
        self._text = TextStream(tokenizer, stop) if tokenizer is not None else None
        # Stop strings end a sequence, so the worker looks for them; other text is made where it is read.
        self._watched = bool(stop)
        self._max_buffered = max_buffered
        self._observer = observer
        self._ready = threading.Condition()
        self._events: deque[_Raw] = deque()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._wakes = wakes
        self._ended = False
        self.error: QCompilerError | None = None
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self.created = self._last = time.monotonic()
        self._full_since: float | None = None
        self._cancel: Callable[[Task], None] | None = None
        self._nudge: Callable[[], None] | None = None

    def attach(
        self, task: Task, prompt_tokens: int, *, cancel: Callable[[Task], None], nudge: Callable[[], None]
    ) -> None:
        """Say whose events these are; done once by the service."""
        self.task, self.prompt_tokens, self._cancel, self._nudge = task, prompt_tokens, cancel, nudge

    # The reader's side

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were in the cache already."""
        return self.task.cached_tokens

    def cancel(self) -> None:
        """End the request; does nothing if it has ended."""
        if not self._ended and self._cancel is not None:
            self._cancel(self.task)

    def result(self) -> Generation:
        """Read to the end.

        Raises:
            QCompilerError: the request failed.
        """
        text = "".join(event.text for event in self)
        return self._generation(text)

    async def aresult(self) -> Generation:
        """`result` for an event loop."""
        text = "".join([event.text async for event in self])
        return self._generation(text)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        with self._ready:
            while not self._events:
                if self._ended:
                    self._raise_error()
                    raise StopIteration
                self._ready.wait()
            taken, freed = self._take(1)
        return self._tell(taken, freed)[0]

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        events = await self._next(1)
        if not events:
            raise StopAsyncIteration
        return events[0]

    async def read(self) -> list[Event]:
        """All events that are there by now, at least one; none at the end.

        Raises:
            QCompilerError: the request failed.
        """
        return await self._next(self._max_buffered)

    async def _next(self, most: int) -> list[Event]:
        while True:
            with self._ready:
                if self._events:
                    taken, freed = self._take(most)
                    break
                if self._ended:
                    self._raise_error()
                    return []
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, future)
            await future
        return self._tell(taken, freed)

    def _take(self, most: int) -> tuple[list[_Raw], bool]:
        taken = [self._events.popleft() for _ in range(min(most, len(self._events)))]
        freed = self._full_since is not None and len(self._events) <= self._max_buffered // 2
        if freed:
            self._full_since = None
        return taken, freed

    def _tell(self, taken: list[_Raw], freed: bool) -> list[Event]:
        if freed and self._nudge is not None:
            self._nudge()
        return [self._event(*raw) for raw in taken]

    def _event(
        self,
        text: str,
        token: int | None,
        logprob: TokenLogprob | None,
        reason: FinishReason | None,
        gives_text: bool,
    ) -> Event:
        if self._text is not None and not self._watched:
            try:
                if reason is not None:
                    text = self._text.finish()
                elif gives_text and token is not None:
                    text = self._text.add([token])
            except QCompilerError as e:
                with self._ready:
                    self._events.clear()
                    self._ended, self.finish_reason, self.error = True, "aborted", e
                if self._cancel is not None:
                    self._cancel(self.task)
                raise
        return Event(text, token, logprob, reason)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _generation(self, text: str) -> Generation:
        return Generation(text, self.token_ids, self.finish_reason or "aborted", self.prompt_tokens)

    # The worker's side

    def accept(self, token: int, logprob: TokenLogprob | None, *, stops: bool) -> bool:
        """Take a token; True if a stop string is complete."""
        watched = self._text if self._watched else None
        text = watched.add([token]) if watched is not None and not stops else ""
        self.token_ids.append(token)
        self._put((text, token, logprob, None, not stops))
        if self._observer is not None:
            now = time.monotonic()
            first = len(self.token_ids) == 1
            (self._observer.first_token if first else self._observer.next_token)(now - self._last)
            self._last = now
        return watched is not None and watched.stopped

    def full(self) -> bool:
        """Whether the reader has to catch up first."""
        return self._full_since is not None

    def stalled(self, now: float) -> float:
        """Seconds since the buffer became full."""
        since = self._full_since
        return 0.0 if since is None else now - since

    def end(self, reason: FinishReason, error: QCompilerError | None) -> None:
        """Give out what was held back, and the reason of the end."""
        self.finish_reason, self.error = reason, error
        text = ""
        if error is None and self._text is not None and self._watched:
            try:
                text = self._text.finish()
            except QCompilerError as e:
                self.finish_reason, self.error = "aborted", e
        if self.error is None:
            self._put((text, None, None, reason, False), last=True)
        else:
            self._put(None, last=True)
        if self._observer is not None:
            self._observer.finished("error" if self.error is not None else reason)

    def _put(self, event: _Raw | None, *, last: bool = False) -> None:
        with self._ready:
            if event is not None:
                self._events.append(event)
            if len(self._events) >= self._max_buffered and self._full_since is None:
                self._full_since = time.monotonic()
            self._ended = self._ended or last
            waiter, self._waiter = self._waiter, None
            self._ready.notify_all()
        if waiter is not None:
            self._wakes.add(*waiter, self)
