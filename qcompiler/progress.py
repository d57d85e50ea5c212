"""Progress of long work: live bars on a terminal, a line per stage in a log, nothing when quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[str], None]


class Progress:
    """Tells nobody; the base that the pipeline calls when used as a library."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """One stage of work with `total` steps; the yielded function marks a step as done and names it."""
        yield lambda _step: None

    def note(self, message: str) -> None:
        """Something worth knowing that is not an error."""


class ConsoleProgress(Progress):
    """Progress on a rich console, which must write to stderr so that stdout stays the result's."""

    def __init__(self, console: Console, *, verbose: bool = False):
        self._console = console
        self._verbose = verbose

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """See `Progress.stage`; ends with a line that tells how long it took."""
        started = time.perf_counter()
        if self._console.is_terminal:
            with self._bar(name, total) as advance:
                yield advance
        else:
            yield self._log_step if self._verbose else (lambda _step: None)
        seconds = time.perf_counter() - started
        self._console.print(f"{name}: {total} in {seconds:.1f} s", style="dim", highlight=False)

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        self._console.print(message, style="yellow", highlight=False, markup=False)

    def _log_step(self, step: str) -> None:
        if step:
            self._console.print(f"  {step}", highlight=False, markup=False)

    @contextlib.contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Advance]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[step]}", style="dim"),
        )  # fmt: skip
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=total, step="")
            yield lambda step: bars.update(task, advance=1, step=step)
