"""qrun eval."""

from __future__ import annotations

from pathlib import Path

import click

from qcompiler.runtime.cli.options import (
    artifact_argument,
    common,
    console,
    device,
    load_model,
    print_json,
    read_text,
)


@click.command("eval")
@artifact_argument
@click.option(
    "--text", "text_file", required=True, type=click.Path(path_type=Path), help="UTF-8 text file to score."
)
@click.option("--context", type=int, default=512, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=int, default=None, help="Use only the text's first tokens.")
@device
@common
def command(
    artifact: Path,
    text_file: Path,
    context: int,
    max_tokens: int | None,
    device: str | None,
    lean: bool,
    kv_bits: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Perplexity of a text file.

    The whole file is encoded without special tokens and cut into windows of --context tokens; the
    first token of each is not scored. With --json: perplexity, nll, tokens, seconds.
    """
    from rich.progress import Progress

    from qcompiler.runtime.evaluate import evaluate

    text = read_text(text_file)
    model = load_model(artifact, device, verbose=verbose, lean=lean, kv_bits=kv_bits)
    with Progress(console=console(), transient=True, disable=as_json) as progress:
        task = progress.add_task("scoring")
        result = evaluate(
            model,
            text,
            context=context,
            max_tokens=max_tokens,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(dict(vars(result)))
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f}  nll {result.nll:.4f}  "
            f"tokens {result.tokens}  seconds {result.seconds:.1f}"
        )
