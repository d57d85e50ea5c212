"""qrun serve."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.cli.options import artifact_argument, console, device, load_model

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "pydantic")


@click.command("serve")
@artifact_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys of clients, one a line.")
@click.option("--name", default=None, help="What clients call the model; default: the artifact's folder.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="A web origin that may ask; repeatable.")
@click.option("--limits", type=click.Path(path_type=Path), help="JSON file with limits on requests.")
@click.option("--max-sequences", type=int, default=None, help="Most sequences in the batch.")
@click.option("--max-step-tokens", type=int, default=None, help="Most tokens computed in one step.")
@click.option(
    "--prefill-chunk",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Most prompt tokens in a step in which others generate; 0 takes every prompt at once.",
)
@click.option("--max-cache-tokens", type=int, default=None, help="Tokens that the KV cache holds.")
@device
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks, log messages and every request.")
def command(
    artifact: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    name: str | None,
    allow_origin: tuple[str, ...],
    limits: Path | None,
    max_sequences: int | None,
    max_step_tokens: int | None,
    prefill_chunk: int,
    max_cache_tokens: int | None,
    device: str | None,
    lean: bool,
    kv_bits: str | None,
    verbose: bool,
) -> None:
    """Serve an artifact by OpenAI's HTTP API, with a page to chat at /.

    Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /ready, /metrics. Only this
    machine is answered unless --host says otherwise. SIGTERM lets running requests finish.
    """
    missing = [m for m in _NEEDED if importlib.util.find_spec(m) is None]
    if missing:
        raise InvalidInputError(
            f"qrun serve needs {', '.join(missing)}", hint="pip install 'qcompiler[serve]'"
        )
    from qcompiler.runtime.server.app import create_app
    from qcompiler.runtime.server.limits import Limits, read_limits
    from qcompiler.runtime.server.main import allowed_hosts, bind, make_server, read_api_keys

    keys = read_api_keys(api_key_file) if api_key_file else ()
    bounds = read_limits(limits) if limits else Limits()
    listener = bind(host, port)
    with listener:
        model = load_model(
            artifact,
            device,
            verbose=verbose,
            lean=lean,
            kv_bits=kv_bits,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            max_cache_tokens=max_cache_tokens,
            warm_up=True,
        )
        app = create_app(
            model,
            bounds,
            name=name or artifact.resolve().name,
            api_keys=keys,
            allow_origins=allow_origin,
            allow_hosts=allowed_hosts(host),
            chunked_prefill=prefill_chunk > 0,
            prefill_chunk=prefill_chunk or 1,
        )
        shown = f"[{host}]" if ":" in host else host
        err = console()
        err.print(f"serving on http://{shown}:{listener.getsockname()[1]}", markup=False, highlight=False)
        err.print(f"ready after {model.cold_start}", markup=False, highlight=False)
        if not keys and allowed_hosts(host) is None:
            err.print("anybody who reaches this address may ask (--api-key-file)", style="yellow")
        make_server(app, bounds, access_log=verbose).run(sockets=[listener])
