"""qrun tune."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.cli.options import artifact_argument, common, console, print_json

if TYPE_CHECKING:
    from qcompiler.kernels.tuning.tune import Choice, Gpu

_MOST_TOKENS = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where is measured: the GPU's name, versions that a table notes, and what measures."""

    gpu: str
    versions: dict[str, str]
    measure: Gpu


@click.command("tune")
@artifact_argument
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Table to write or add to; default: the user's own, which every run reads.",
)  # fmt: skip
@click.option(
    "--tokens", default="1,2,4,8,16,32,64,128,256,1024", show_default=True,
    help="Numbers of tokens to tune for, by commas.",
)  # fmt: skip
@click.option("--thorough", is_flag=True, help="Try more configurations.")
@common
def command(
    artifact: Path, output: Path | None, tokens: str, thorough: bool, as_json: bool, verbose: bool
) -> None:
    """Measure kernel configurations on this GPU.

    Compiles and checks candidates for each linear of the artifact, times those that are right, and writes
    the fastest into a table. What is measured is kept when it is interrupted.

    With --json: gpu, table, and choices, a list of key, us, unasked_us, config (null where what runs unasked
    is as fast), tried and wrong.
    """
    from rich.progress import Progress

    from qcompiler.kernels.tuning.tables import check_writable, table_path, user_folder, write_table
    from qcompiler.kernels.tuning.tune import tune
    from qcompiler.runtime.artifact import open_artifact
    from qcompiler.runtime.tuning import tunable_linears

    counts = _tokens(tokens)
    place = this_gpu()
    weights = tunable_linears(open_artifact(artifact, verify="sizes"))
    table = output or table_path(place.gpu, user_folder())
    choices: list[Choice] = []
    with _writing(table):
        check_writable(table)
    with Progress(console=console(), transient=True) as bar:
        task = bar.add_task("compiling", total=None)

        def progress(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        for found in tune(weights, counts, thorough=thorough, gpu=place.measure, progress=progress):
            choices += found
            entries = {choice.key: choice.config for choice in found if choice.config is not None}
            with _writing(table):
                write_table(table, place.gpu, entries, place.versions)
    if as_json:
        print_json({"gpu": place.gpu, "table": str(table), "choices": [_to_json(c) for c in choices]})
        return
    _print(choices, place.gpu)
    click.echo(f"wrote {table}", err=True)
    if output is not None:
        click.echo(
            f"  Runs read {table_path(place.gpu, user_folder())}; QCOMPILER_TUNING names another folder.",
            err=True,
        )


@contextlib.contextmanager
def _writing(table: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise InvalidInputError(
            f"{table}: {e.strerror}", hint="Give --output, or set QCOMPILER_TUNING to a folder."
        ) from e


def this_gpu() -> Place:
    """The GPU that is there.

    Raises:
        InvalidInputError: There is none, or no Triton to compile for it.
    """
    import torch

    if not torch.cuda.is_available():
        raise InvalidInputError(
            "tuning measures kernels on a GPU, and torch sees none on this machine",
            hint="Run it where the model will be served; without a table, sane configurations are used.",
        )
    try:
        import triton
    except ImportError:
        raise InvalidInputError(
            "tuning needs Triton, which is not installed", hint="pip install 'qcompiler[gpu]'"
        ) from None
    from qcompiler.kernels.tuning.tune import Gpu

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return Place(torch.cuda.get_device_name(), versions, Gpu())


def _tokens(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"--tokens {text!r} is not a list of numbers", hint="For example 1,16,256."
        ) from None
    if not all(1 <= count <= _MOST_TOKENS for count in counts):
        raise InvalidInputError(f"--tokens: numbers must be in [1, {_MOST_TOKENS}]")
    return list(dict.fromkeys(counts))


def _to_json(choice: Choice) -> dict[str, Any]:
    return {
        "key": choice.key,
        "us": choice.us,
        "unasked_us": choice.unasked_us,
        "config": None if choice.config is None else choice.config.to_json(),
        "tried": choice.tried,
        "wrong": choice.wrong,
    }


def _print(choices: list[Choice], gpu: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("format", "out x in", "tokens", "before, µs", "now, µs", "chosen of", title=gpu)
    for choice in choices:
        _, form, _ = choice.key.split("/", 2)
        table.add_row(
            form, f"{choice.weight.n}x{choice.weight.k}", str(choice.tokens), f"{choice.unasked_us:.1f}",
            f"{choice.us:.1f}" if choice.config else "as before", str(choice.tried),
        )  # fmt: skip
    Console().print(table)
