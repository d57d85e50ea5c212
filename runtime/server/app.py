"""The application: OpenAI's endpoints, health, metrics, and a page to chat."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from qcompiler.kernels.errors import QCompilerError
from qcompiler.runtime.model import Model
from qcompiler.runtime.scheduler import PREFILL_CHUNK
from qcompiler.runtime.server import answers
from qcompiler.runtime.server.completions import Completions
from qcompiler.runtime.server.faults import error_response, public_message, status_of
from qcompiler.runtime.server.gate import Gate
from qcompiler.runtime.server.limits import Limits
from qcompiler.runtime.server.metrics import Metrics
from qcompiler.runtime.server.openapi import describe
from qcompiler.runtime.server.schemas import ChatRequest, CompletionRequest
from qcompiler.runtime.service import Service

log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "static" / "index.html"


def create_app(
    model: Model,
    limits: Limits | None = None,
    *,
    name: str,
    api_keys: Seq[str] = (),
    allow_origins: Seq[str] = (),
    allow_hosts: Seq[str] | None = None,
    chunked_prefill: bool = True,
    prefill_chunk: int = PREFILL_CHUNK,
) -> FastAPI:
    """An application that serves one model; the service lives from its start to its shutdown.

    Args:
        model: A decoder with a tokenizer.
        limits: Bounds on requests.
        name: What clients call the model.
        api_keys: Keys of which a request must have one; none given, everybody may ask.
        allow_origins: Web origins that may ask beside our own page.
        allow_hosts: Host names that are answered; None for any.
        chunked_prefill: Take long prompts in pieces between the steps of others.
        prefill_chunk: Most prompt tokens in a step in which others generate.

    Returns:
        The app; `app.state.service` is its service once it has started.

    Raises:
        InvalidInputError: the model is an encoder.
        ArtifactError: the model has no tokenizer.
    """
    limits = limits or Limits()
    metrics = Metrics()
    _ = model.engine, model.tokenizer  # either may be missing, which is told now
    model.limit_template(limits.template_seconds)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(
            model,
            max_waiting=limits.max_waiting,
            max_buffered=limits.max_buffered,
            stall_seconds=limits.stall_seconds,
            request_seconds=limits.request_seconds,
            chunked_prefill=chunked_prefill,
            prefill_chunk=prefill_chunk,
            observer=metrics,
        )
        metrics.watch(service)
        app.state.service = service
        app.state.completions = Completions(service, limits, name)
        try:
            yield
        finally:
            service.close()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="qcompiler", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate,
        max_body_bytes=limits.max_body_bytes,
        max_header_bytes=limits.max_header_bytes,
        api_keys=api_keys,
        allow_origins=allow_origins,
        allow_hosts=allow_hosts,
        on_response=metrics.response,
    )
    _add_faults(app)
    entry = {"id": name, "object": "model", "created": created, "owned_by": "qcompiler"}
    entry["max_model_len"] = model.max_context

    @app.post("/v1/completions", response_model=None, responses=answers.generates(answers.Completion))
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue a text."""
        return await app.state.completions.answer(body, http)

    @app.post(
        "/v1/chat/completions", response_model=None, responses=answers.generates(answers.ChatCompletion)
    )
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        """The assistant's next message."""
        return await app.state.completions.answer(body, http)

    @app.get("/v1/models", response_model=None, responses=answers.tells(answers.ModelList))
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model_id:path}", response_model=None, responses=answers.tells(answers.ModelEntry))
    async def one_model(model_id: str) -> Response:
        """The model by its name."""
        if model_id != name:
            return error_response(404, f"the model {model_id!r} is not served here; {name!r} is", "model")
        return JSONResponse(entry)

    @app.get("/health", response_model=None, responses=answers.STATE)
    async def health() -> Response:
        """Whether the process is worth keeping."""
        return _state(app.state.service.lost is None)

    @app.get("/ready", response_model=None, responses=answers.STATE)
    async def ready() -> Response:
        """Whether requests are taken."""
        return _state(app.state.service.ready)

    @app.get("/metrics", response_class=PlainTextResponse, responses=answers.METRICS)
    async def read_metrics() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page, policy = _page()

    @app.get("/", response_model=None, include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Frame-Options": "DENY"})

    describe(app, name=name, limits=limits, max_context=model.max_context)
    return app


def _state(good: bool) -> Response:
    return JSONResponse({"status": "ok" if good else "unavailable"}, 200 if good else 503)


def _page() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run and nothing else."""
    text = _PAGE.read_text(encoding="utf-8")

    def sources(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(f.encode()).digest()).decode() for f in found]
        return " ".join(f"'sha256-{d}'" for d in digests)

    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {sources('script')}; "
        f"style-src {sources('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _add_faults(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> Response:
        # Only where and what: the input itself may be huge, or no Unicode.
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return error_response(400, f"{where}: {first['msg']}", where)

    @app.exception_handler(QCompilerError)
    async def known(request: HttpRequest, error: QCompilerError) -> Response:
        status = status_of(error)
        if status >= 500:
            log.error("%s %s: %s", request.method, request.url.path, error.message)
        return error_response(status, public_message(error))

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})  # 405 names the methods that are served
        return response

    @app.exception_handler(Exception)
    async def unknown(request: HttpRequest, error: Exception) -> Response:
        return error_response(500, "internal error")
