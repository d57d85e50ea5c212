"""Options and helpers that the commands share."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.kv_bits import KV_BITS

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.runtime.model import Model

F = TypeVar("F", bound=Callable[..., Any])

artifact_argument = click.argument("artifact", type=click.Path(path_type=Path))


def common(function: F) -> F:
    """--json and -v."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else."
    )(function)
    return click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and log messages.")(function)


def device(function: F) -> F:
    """--device, --lean and --kv-bits."""
    function = click.option(
        "--kv-bits", type=click.Choice(list(KV_BITS)), help="Of the KV cache; default: as compiled."
    )(function)
    function = click.option("--lean", is_flag=True, help="On a CPU: less memory, slower long prompts.")(
        function
    )
    text = "cpu, cuda or cuda:N; default: a GPU if there is one."
    return click.option("--device", default=None, metavar="D", help=text)(function)


def sampling(function: F) -> F:
    """Options of `SamplingParams`."""
    for option in reversed(
        (
            click.option(
                "--max-tokens", type=int, default=128, show_default=True, help="Most tokens to generate."
            ),
            click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
            click.option("--top-k", type=int, default=0, help="Keep the k most likely tokens."),
            click.option("--top-p", type=float, default=1.0, help="Keep tokens of this total probability."),
            click.option(
                "--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest."
            ),
            click.option(
                "--repetition-penalty", type=float, default=1.0, help="Above 1 discourages repetition."
            ),
            click.option("--seed", type=int, default=None, help="Makes sampling repeatable."),
            click.option("--stop", multiple=True, help="End the text at this string; may be given again."),
        )
    ):
        function = option(function)
    return function


def load_model(artifact: Path, device: str | None, *, verbose: bool = False, **options: Any) -> Model:
    """`qcompiler.runtime.model.load` with log messages on stderr."""
    from qcompiler.runtime.model import load

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    return load(artifact, device, **options)


def console() -> Console:
    """Where people read: stderr."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def read_text(path: Path) -> str:
    """A text file, which must be UTF-8.

    Raises:
        InvalidInputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path}: not UTF-8 at byte {e.start}") from None
    except OSError as e:
        raise InvalidInputError(f"{path}: {e.strerror}") from None
