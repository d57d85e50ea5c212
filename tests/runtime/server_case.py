"""A real server in this process: uvicorn in a thread, on a free port of the loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

NAME = "tiny"


@dataclass
class Running:
    """A server that answers."""

    url: str
    port: int
    app: Any
    model: Any
    server: Any

    @property
    def service(self):
        return self.app.state.service

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def post(self, path: str, body: Any, **options) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def openai(self):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def rest(self, seconds: float = 30.0) -> None:
        """Wait until nothing runs, then check that every page is accounted for."""
        end = time.monotonic() + seconds
        while self.service.stats().waiting or self.service.stats().running:
            assert time.monotonic() < end, "the service does not come to rest"
            time.sleep(0.02)
        self.service.check()
        assert self.service.scheduler.pool.held == 0


@contextlib.contextmanager
def serving(artifact: Path, *, load_options=None, limits=None, **options) -> Iterator[Running]:
    from qcompiler.runtime.model import load
    from qcompiler.runtime.server.app import create_app
    from qcompiler.runtime.server.gate import LOOPBACK
    from qcompiler.runtime.server.limits import Limits
    from qcompiler.runtime.server.main import bind, make_server

    model = load(artifact, device="cpu", verify="sizes", **(load_options or {}))
    bounds = Limits(**(limits or {}))
    app = create_app(model, bounds, **{"name": NAME, "allow_hosts": LOOPBACK, **options})
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = make_server(app, bounds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < end, "the server did not start in time"
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{port}", port, app, model, server)
        finally:
            server.should_exit = True
            thread.join(30)
