"""qrun generate."""

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
    device,
    load_model,
    print_json,
    read_text,
    sampling,
)


@click.command("generate")
@artifact_argument
@click.option("--prompt", "-p", multiple=True, help="Text to continue; '-' reads stdin; may be given again.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@sampling
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@device
@common
def command(
    artifact: Path,
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    device: str | None,
    lean: bool,
    kv_bits: str | None,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Continue one or more prompts.

    With --json: text, token_ids, tokens_per_second, finish_reason and prompt_tokens; for several
    prompts `results`, a list of those, and tokens_per_second over all.
    """
    from qcompiler.runtime.sampling import SamplingParams

    SamplingParams.make(**options)  # refused before the model is loaded
    prompts = [sys.stdin.read() if p == "-" else p for p in prompt]
    if prompt_file is not None:
        prompts.append(read_text(prompt_file))
    if not prompts:
        raise InvalidInputError(
            "no prompt was given", hint="Use --prompt TEXT, --prompt - or --prompt-file FILE."
        )
    model = load_model(artifact, device, verbose=verbose, lean=lean, kv_bits=kv_bits)
    if not as_json and len(prompts) == 1:
        pieces = model.generate(prompts[0], stream=True, **options)
        click.echo(prompts[0], nl=False)  # once the prompt has been accepted
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        return
    start = time.perf_counter()
    results = model.complete(prompts, **options)
    seconds = time.perf_counter() - start
    rate = sum(len(r.token_ids) for r in results) / seconds
    if not as_json:
        for text, result in zip(prompts, results, strict=True):
            click.echo(text + result.text)
            click.echo()
        return
    objects = [
        {
            "text": r.text,
            "token_ids": r.token_ids,
            "finish_reason": r.finish_reason,
            "prompt_tokens": r.prompt_tokens,
        }
        for r in results
    ]
    if len(objects) == 1:
        print_json({**objects[0], "tokens_per_second": rate})
    else:
        print_json({"results": objects, "tokens_per_second": rate})
