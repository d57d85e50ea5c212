"""Where the time of a block goes: seconds by phase, the device waited for at each border."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("moments", "metric", "k-means", "codes", "codebooks", "tuning")


class PhaseClock:
    """Adds up the seconds of each phase.

    Attributes:
        seconds: Phase → seconds so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what stands inside."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
