"""Tensors made from parameters by recipes, made once and kept for as long as the parameters live.

Dynamo compiles a function again for other shapes, and one graph serves every layer of its kind;
neither must quantize a weight twice. An entry is known by its recipe and the very parameters that the
recipe reads, at their version: torch counts writes in place, so a changed weight is made anew.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from qcompiler.passes.weights import Loaded, Quantized, Recipe, resolve, sources

Parameters = Mapping[str, torch.Tensor]


def version(parameter: torch.Tensor) -> tuple[int, int]:
    """What changes with a tensor's values, as far as torch tells: its count of writes in place, its memory.

    A write through `.data` is not counted, nor is any to an inference tensor: see `forget`.
    """
    return (0 if parameter.is_inference() else parameter._version), parameter.data_ptr()


class WeightCache:
    """Made tensors by recipe and parameters; thread-safe.

    Attributes:
        generation: How often everything was forgotten; who holds tensors of an earlier one asks again.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._lock = threading.RLock()
        self._made: dict[Hashable, Any] = {}
        self._keys: dict[int, set[Hashable]] = {}
        self._watched: dict[int, tuple[weakref.ref[torch.Tensor], tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def once(self, key: Hashable, parameters: Parameters, make: Callable[[], Any]) -> Any:
        """What `make` gives, called once for this key and these parameters."""
        with self._lock:
            owners = tuple(parameters.values())
            for owner in owners:
                self._watch(owner)
            full = (key, tuple(map(id, owners)))
            if full not in self._made:
                self._made[full] = make()
                for owner in owners:
                    self._keys[id(owner)].add(full)
            return self._made[full]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.generation += 1
            self._made.clear()
            self._keys.clear()
            self._watched.clear()

    def _watch(self, owner: torch.Tensor) -> None:
        """Drop what was made from an earlier tensor of this identity, or from its earlier values."""
        ident, now = id(owner), version(owner)
        known = self._watched.get(ident)
        if known is not None and known[0]() is owner and known[1] == now:
            return
        self._drop(ident)
        self._keys[ident] = set()
        self._watched[ident] = (weakref.ref(owner, lambda _: self._drop(ident)), now)

    def _drop(self, ident: int) -> None:
        with self._lock:
            self._watched.pop(ident, None)
            for key in self._keys.pop(ident, ()):
                self._made.pop(key, None)


class Maker:
    """Evaluates the recipes of one graph for one set of parameters.

    Args:
        cache: Where results are kept.
        parameters: The real parameters, by the names that the recipes use.
        quantize: (recipe, float weight [out_features, in_features]) → stored tensors by part.
        settings: What else decides the numbers, e.g. the method's options.
    """

    def __init__(
        self,
        cache: WeightCache,
        parameters: Parameters,
        quantize: Callable[[Quantized, torch.Tensor], Mapping[str, torch.Tensor]],
        settings: Hashable,
    ):
        self._cache, self._parameters = cache, parameters
        self._quantize, self._settings = quantize, settings
        # Parts of weights that end side by side in one tensor: only that tensor is kept.
        self._passing: dict[Hashable, Mapping[str, torch.Tensor]] = {}

    def tensor(self, recipe: Recipe) -> torch.Tensor:
        """The tensor of a recipe; a parameter as it is, is that parameter's own memory."""
        if isinstance(recipe, Loaded) and not recipe.transposed:
            return self._load(recipe.source)
        read = {name: self._parameters[name] for name in sources(recipe)}
        if isinstance(recipe, Quantized):
            key: Hashable = ("quantized", recipe.source, recipe.format, recipe.spec, self._settings)
            return self._cache.once(key, read, lambda: self._parts(recipe))[recipe.part]
        key = ("tensor", recipe, self._settings)
        return self._cache.once(key, read, lambda: resolve(recipe, self._load, self._passing_parts))

    def _load(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()

    def _parts(self, recipe: Quantized) -> Mapping[str, torch.Tensor]:
        return self._quantize(recipe, resolve(recipe.source, self._load))

    def _passing_parts(self, recipe: Quantized) -> Mapping[str, torch.Tensor]:
        key = (recipe.source, recipe.format, recipe.spec)
        if key not in self._passing:
            self._passing[key] = self._parts(recipe)
        return self._passing[key]


WEIGHTS = WeightCache()
