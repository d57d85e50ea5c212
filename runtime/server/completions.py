"""Answers a request: makes its prompts beside the event loop, reads its streams.

When a client leaves, wherever it is by then, its sequences end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.server.faults import error_event, error_response
from qcompiler.runtime.server.grammar import Grammars
from qcompiler.runtime.server.limits import Limits
from qcompiler.runtime.server.options import chat_requests, completion_requests
from qcompiler.runtime.server.replies import Reply
from qcompiler.runtime.server.schemas import ChatRequest, CompletionRequest
from qcompiler.runtime.service import OverloadedError, Request, Service
from qcompiler.runtime.stream import Event, Stream

# Templates run in threads of their own, so that a slow one keeps no plain text waiting.
_TEMPLATE_THREADS, _TEXT_THREADS = 4, 4
# A client that closed its connection; nobody reads this answer.
_GONE = 499
T = TypeVar("T")


class Completions:
    """Both completions endpoints.

    Args:
        service: Runs the sequences.
        limits: Bounds on requests.
        name: What clients call the model.
    """

    def __init__(self, service: Service, limits: Limits, name: str):
        self._service = service
        self._limits = limits
        self._name = name
        self._templates = CapacityLimiter(_TEMPLATE_THREADS)
        self._texts = CapacityLimiter(_TEXT_THREADS)
        self._preparing = 0
        self._grammars = Grammars(service.model)

    async def answer(self, body: ChatRequest | CompletionRequest, http: HttpRequest) -> Response:
        """The response to a request.

        Raises:
            QCompilerError: refused or failed, before anything was sent.
        """
        if body.model is not None and body.model != self._name:
            return error_response(404, f"the model {body.model!r} is not served; {self._name!r} is", "model")
        if body.stream_options is not None and not body.stream:
            return error_response(400, "stream_options needs stream: true", "stream_options")
        requests = await self._prepare(body)
        streams = self._service.submit_all(requests)
        chat = isinstance(body, ChatRequest)
        reply = Reply(self._name, chat=chat, n=body.n or 1, tokenizer=self._service.model.tokenizer)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await self._stream(streams, reply, http, with_usage=with_usage)
        return await self._whole(streams, reply, http)

    async def _prepare(self, body: ChatRequest | CompletionRequest) -> list[Request]:
        if self._preparing >= self._limits.max_preparing:
            raise OverloadedError(f"{self._preparing} requests are being prepared", hint="Try again later.")
        model, limits = self._service.model, self._limits
        self._preparing += 1
        try:
            if isinstance(body, ChatRequest):
                return await to_thread.run_sync(
                    chat_requests, body, model, limits, self._grammars, limiter=self._templates
                )
            return await to_thread.run_sync(completion_requests, body, model, limits, limiter=self._texts)
        finally:
            self._preparing -= 1

    async def _whole(self, streams: list[Stream], reply: Reply, http: HttpRequest) -> Response:
        try:
            events = await _unless_gone(asyncio.ensure_future(_read_all(streams)), http)
        finally:
            for stream in streams:
                stream.cancel()
        if events is None:
            return Response(status_code=_GONE)
        return JSONResponse(reply.whole(list(zip(streams, events, strict=True))))

    async def _stream(
        self, streams: list[Stream], reply: Reply, http: HttpRequest, *, with_usage: bool
    ) -> Response:
        merged = _Merged(streams)
        try:
            # Whatever fails before the first token still has a status.
            first = await _unless_gone(asyncio.ensure_future(merged.next()), http)
            if first is not None and isinstance(first[1], QCompilerError):
                raise first[1]
        except BaseException:
            merged.close()
            raise
        if first is None:
            merged.close()
            return Response(status_code=_GONE)

        async def chunks() -> AsyncIterator[bytes]:
            for index in range(len(streams)):
                if opening := reply.opening(index):
                    yield opening
            index, item = first
            left = len(streams)
            while True:
                if isinstance(item, QCompilerError):
                    yield error_event(item)
                    return
                # What came while the last piece was sent goes out as one.
                if pieces := b"".join(reply.piece(index, event) for event in item):
                    yield pieces
                left -= item[-1].finish_reason is not None
                if not left:
                    break
                index, item = await merged.next()
            yield reply.closing(streams, with_usage=with_usage)

        return _EventStream(chunks(), merged.close)


_Events = list[Event] | QCompilerError


class _Merged:
    """Events of several streams in the order in which they come, through a small queue."""

    def __init__(self, streams: list[Stream]):
        self._streams = streams
        self._queue: asyncio.Queue[tuple[int, _Events]] = asyncio.Queue(16)
        several = streams if len(streams) > 1 else []
        self._readers = [asyncio.ensure_future(self._pump(i, s)) for i, s in enumerate(several)]

    async def next(self) -> tuple[int, _Events]:
        """Some events of one stream, or how it failed."""
        if self._readers:
            return await self._queue.get()
        return 0, await _some(self._streams[0])

    def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        for stream in self._streams:
            stream.cancel()

    async def _pump(self, index: int, stream: Stream) -> None:
        while True:
            events = await _some(stream)
            await self._queue.put((index, events))
            if isinstance(events, QCompilerError) or events[-1].finish_reason is not None:
                return


async def _some(stream: Stream) -> _Events:
    try:
        return await stream.read()
    except QCompilerError as e:
        return e


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called however the response ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _read_all(streams: list[Stream]) -> list[list[Event]]:
    return await asyncio.gather(*(_read(s) for s in streams))


async def _read(stream: Stream) -> list[Event]:
    found: list[Event] = []
    while events := await stream.read():
        found += events
    return found


async def _unless_gone(work: asyncio.Future[T], http: HttpRequest) -> T | None:
    """The result of `work`, or None if the client leaves first; `work` is cancelled then."""
    leaving = asyncio.ensure_future(_disconnected(http))
    both: list[asyncio.Future[Any]] = [work, leaving]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
        leaving.cancel()


async def _disconnected(http: HttpRequest) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await http.receive())
