"""A part of a store under a prefix of its own, for allocations that are tried one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcompiler.calibration.runner import PartStore


class PrefixedStore:
    """A `PartStore` whose names all begin alike in the one behind it."""

    def __init__(self, store: PartStore, prefix: str):
        self._store = store
        self._prefix = prefix

    def finished(self, layer: str) -> dict[str, Any] | None:
        """See `PartStore`."""
        return self._store.finished(self._prefix + layer)

    def store(self, layer: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """See `PartStore`."""
        self._store.store(self._prefix + layer, tensors, info)

    def load(self, layer: str) -> dict[str, Tensor]:
        """See `PartStore`."""
        return self._store.load(self._prefix + layer)
