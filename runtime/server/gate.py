"""What stands before every endpoint: sizes, origin, host and key; plain ASGI, so that nothing is read before.

Browsers let any page send simple requests to localhost and only hide the
answer; so a request that names a foreign origin is refused, not just left
without CORS headers. A page can also give its own name our address (DNS
rebinding): bound to loopback, the server answers to its own names only.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from collections.abc import Sequence as Seq
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qcompiler.runtime.server.faults import error_response

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/health", "/ready")  # no key needed
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """ASGI middleware.

    Args:
        app: What stands behind.
        max_body_bytes: Larger bodies get 413, before they are read.
        max_header_bytes: A larger head gets 431.
        api_keys: Any of them opens; none given, no key is needed.
        allow_origins: Origins beside our own, e.g. "https://example.org".
        allow_hosts: Names that we answer to; None for any.
        on_response: Told of the status of every response.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_header_bytes: int,
        api_keys: Seq[str] = (),
        allow_origins: Seq[str] = (),
        allow_hosts: Seq[str] | None = None,
        on_response: Callable[[int], None] = lambda status: None,
    ):
        self._app = app
        self._max_body = max_body_bytes
        self._max_header = max_header_bytes
        self._on_response = on_response
        self._keys = [_digest(key) for key in api_keys]
        self._origins = frozenset(o.lower().rstrip("/") for o in allow_origins)
        self._hosts = None if allow_hosts is None else frozenset(h.lower() for h in allow_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        refused = self._refuse(scope)
        if refused is not None:
            self._on_response(refused[0])
            await error_response(*refused)(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin", "").lower()
        allowed = origin if origin in self._origins else None
        if allowed is not None and scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": _cors(allowed, True)})
            await send({"type": "http.response.body", "body": b""})
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._max_body:
                    raise HTTPException(413, self._too_large())
            return message

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_response(message["status"])
                extra = [*_SECURITY, *(_cors(allowed, False) if allowed else [])]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self._app(scope, bounded, marked)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        raw = scope["headers"]
        headers = Headers(scope=scope)
        path = scope.get("raw_path") or b""
        size = len(path) + len(scope.get("query_string", b"")) + sum(len(k) + len(v) + 4 for k, v in raw)
        if size > self._max_header:
            return 431, f"the request's head is larger than {self._max_header} bytes"
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 403, "this server does not answer to that host name"
        origin = headers.get("origin")
        if origin is not None and not self._same(origin, host) and origin.lower() not in self._origins:
            return 403, "requests from other origins are denied (qrun serve --allow-origin)"
        preflight = scope["method"] == "OPTIONS" and origin is not None
        if self._keys and scope["path"] not in _OPEN and not preflight:
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = _digest(key.strip())
            known = [hmac.compare_digest(given, k) for k in self._keys]
            if kind.lower() != "bearer" or not any(known):
                return 401, "a valid API key is needed: Authorization: Bearer KEY"
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._max_body):
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body} bytes"

    @staticmethod
    def _same(origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower() != ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """The name of a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cors(origin: str, preflight: bool) -> list[tuple[bytes, bytes]]:
    headers = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
    if preflight:
        headers += [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-max-age", b"600"),
        ]
    return headers
