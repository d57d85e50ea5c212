"""Starts the server: a socket first, then the model, then requests; SIGTERM lets what runs finish."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.server.faults import error_body
from qcompiler.runtime.server.gate import LOOPBACK
from qcompiler.runtime.server.limits import Limits

_MAX_KEY_FILE = 1 << 20


class Server(uvicorn.Server):
    """uvicorn that refuses new requests from the signal on, and ends with exit code 0 once all is done."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        app = self.config.app
        service = getattr(app.state, "service", None) if isinstance(app, FastAPI) else None
        if service is not None:
            service.drain()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM without raising them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


class _Protocol(H11Protocol):
    """HTTP/1.1 that tells a head beyond all bounds (431) from one that makes no sense (400)."""

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) != 431 or self.conn.our_state is not h11.IDLE:
            super().send_400_response(msg)
            return
        body = JSON_431
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        headers.append(("connection", "close"))
        for event in (
            h11.Response(status_code=431, headers=headers, reason=b"Request Header Fields Too Large"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InvalidInputError: the address is taken, or is none of ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise InvalidInputError(f"cannot listen on {host} port {port}: {reason}") from None
    # Connections inherit it. asyncio sets it only on sockets that name their protocol, which these do not;
    # without it each answer waits up to 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def make_server(app: FastAPI, limits: Limits, *, access_log: bool = False) -> Server:
    """A server for an application; run it on sockets from `bind`."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=int(limits.drain_seconds),
        limit_concurrency=limits.max_connections,
        # The head is bounded by the gate, which can say so; this is for heads that never end.
        h11_max_incomplete_event_size=max(64 << 10, 2 * limits.max_header_bytes),
    )
    return Server(config)


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Keys, one a line; empty lines and those that begin with # are passed over.

    Raises:
        InvalidInputError: the file cannot be read, or has no key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_KEY_FILE + 1)
    except UnicodeDecodeError:
        raise InvalidInputError(f"{path}: not UTF-8") from None
    except OSError as e:
        raise InvalidInputError(f"{path}: {e.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or len(text) > _MAX_KEY_FILE:
        raise InvalidInputError(f"{path}: holds no API key, or is too large", hint="Write one key a line.")
    return keys


def allowed_hosts(host: str) -> tuple[str, ...] | None:
    """Names that a server bound to `host` answers to: its own on loopback, any elsewhere."""
    return tuple(sorted({*LOOPBACK, host})) if host in LOOPBACK or host.startswith("127.") else None


def _json_431() -> bytes:
    from json import dumps

    return dumps(error_body(431, "the request's head is too large")).encode()


JSON_431 = _json_431()
