"""Seconds from the start of the process until a model can answer, phase by phase."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_IMPORTED = time.perf_counter()


def process_seconds() -> float:
    """Age of this process in seconds; where the system does not tell, since this module was imported."""
    try:
        # proc(5): field 22 is the start in clock ticks after boot; the name before may hold anything.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        started = int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _IMPORTED


class ColdStart:
    """Times the phases of getting ready.

    Attributes:
        phases: Seconds by phase, in order; "start" is what came before the first.
        seconds: From the start of the process to the end of the last phase.
    """

    def __init__(self) -> None:
        self.seconds = process_seconds()
        self.phases = {"start": self.seconds}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        begin = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin
        self.seconds = process_seconds()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"seconds": self.seconds, **{f"{name}_seconds": s for name, s in self.phases.items()}}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"{self.seconds:.2f} s ({parts})"
