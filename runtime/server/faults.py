"""Errors as OpenAI's API writes them, and which status each of ours has."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse, Response

from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.scheduler import DeviceLostError
from qcompiler.runtime.service import ClosedError, OverloadedError
from qcompiler.runtime.stream import StreamTimeoutError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
_TYPES |= {404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error"}


def status_of(error: QCompilerError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, InvalidInputError):
        return 400
    if isinstance(error, OverloadedError):
        return 429
    if isinstance(error, (ClosedError, DeviceLostError)):
        return 503
    return 504 if isinstance(error, StreamTimeoutError) else 500


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": _clean(message),
            "type": _TYPES.get(status, default),
            "param": param and _clean(param),
            "code": status,
        }
    }


def error_response(status: int, message: str, param: str | None = None) -> Response:
    """A response for an error; 401, 429 and 503 say how to go on."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param), status, headers)


def public_message(error: QCompilerError) -> str:
    """What a client is told: everything about its own request, little about our insides."""
    status = status_of(error)
    return str(error) if status < 500 or status in (503, 504) else f"{type(error).__name__}: {error.message}"


def error_event(error: QCompilerError) -> bytes:
    """An error in mid-stream, when the status has long been sent."""
    body = error_body(status_of(error), public_message(error))
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _clean(text: str) -> str:
    """What a client sent may come back in a message, and surrogates cannot be written as UTF-8."""
    return text[:2000].encode("utf-8", "replace").decode()
