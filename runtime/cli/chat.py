"""qrun chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.cli.options import (
    artifact_argument,
    common,
    console,
    device,
    load_model,
    print_json,
    sampling,
)


@click.command("chat")
@artifact_argument
@click.option("--system", default=None, help="A system message.")
@click.option("--message", "-m", default=None, help="Ask this one message and end; otherwise talk.")
@sampling
@device
@common
def command(
    artifact: Path,
    system: str | None,
    message: str | None,
    device: str | None,
    lean: bool,
    kv_bits: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk with the model by its chat template.

    With --json and --message: text, token_ids, tokens_per_second and finish_reason.
    """
    from qcompiler.runtime.sampling import SamplingParams

    SamplingParams.make(**options)
    if as_json and message is None:
        raise InvalidInputError("--json needs --message")
    model = load_model(artifact, device, verbose=verbose, lean=lean, kv_bits=kv_bits)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if message is not None:
        messages.append({"role": "user", "content": message})
        if as_json:
            start = time.perf_counter()
            result = model.generate_tokens(model.chat_tokens(messages), **options)
            rate = len(result.token_ids) / (time.perf_counter() - start)
            print_json(
                {
                    "text": result.text,
                    "token_ids": result.token_ids,
                    "finish_reason": result.finish_reason,
                    "tokens_per_second": rate,
                }
            )
            return
        _answer(model, messages, options)
        return
    err = console()
    err.print("[dim]An empty line or Ctrl-D ends the conversation.[/dim]")
    while True:
        err.print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line.strip():
            return
        messages.append({"role": "user", "content": line.rstrip("\n")})
        messages.append({"role": "assistant", "content": _answer(model, messages, options)})


def _answer(model: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    text = ""
    for piece in model.chat(messages, stream=True, **options):
        click.echo(piece, nl=False)
        sys.stdout.flush()
        text += piece
    click.echo()
    return text
