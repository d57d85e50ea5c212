"""Reads a safetensors checkpoint one parameter at a time, under the names that the transformers model uses.

A parameter costs its own size, never the model's, also where it is assembled from several stored tensors
(stacked experts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcompiler.checkpoint.files import StoredTensor, find_tensors
from qcompiler.checkpoint.mapping import Recipe, build_recipes, convert
from qcompiler.checkpoint.read import read_soon, read_tensor
from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Checkpoint:
    """The weights of a model on disk; open with `Checkpoint.open`, use as a context manager or `close()`.

    Attributes:
        folder: Where it lies.
        unused: Stored names that the model has no parameter for.
    """

    folder: Path
    unused: list[str]
    _model: PreTrainedModel = field(repr=False)
    _stored: dict[str, StoredTensor] = field(repr=False)
    _recipes: dict[str, Recipe] = field(repr=False)
    _wanted: dict[str, torch.Tensor] = field(repr=False)
    _tied: dict[str, str] = field(repr=False)
    _siblings: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path, model: PreTrainedModel) -> Checkpoint:
        """Check a checkpoint against a model, reading headers only.

        Args:
            folder: Local folder of the checkpoint.
            model: The model on the meta device; its state dict says which names and shapes are wanted.

        Raises:
            InvalidInputError: Files are damaged, a parameter is missing or has another shape.
        """
        folder = Path(folder)
        stored = find_tensors(folder)
        recipes, unused = build_recipes(model, list(stored))
        wanted = dict(model.state_dict())
        tied = _tied_names(model, wanted, recipes)
        checkpoint = cls(folder, unused, model, stored, recipes, wanted, tied)
        checkpoint._check()
        return checkpoint

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was read ahead; tensors already read stay valid."""
        self._siblings.clear()

    def names(self) -> list[str]:
        """Names of the distinct parameters and persistent buffers; of tied ones, the one that is kept."""
        return [name for name in self._wanted if self._tied.get(name, name) == name]

    @property
    def tied(self) -> dict[str, str]:
        """Name → the name of the same tensor that `names()` lists."""
        return {alias: name for alias, name in self._tied.items() if alias != name}

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors that the model uses, each once."""
        used = {
            name for recipe in self._recipes.values() for group in recipe.sources.values() for name in group
        }
        return sum(self._stored[name].nbytes for name in used)

    def read_soon(self, limit: int) -> None:
        """Have the system read ahead up to `limit` bytes of the files, in the order of their names."""
        read_soon(sorted({stored.file for stored in self._stored.values()}), limit)

    def untied(self) -> list[str]:
        """Names of tensors that the model ties but the checkpoint stores twice with different values.

        transformers then leaves them apart; a model that is to use this checkpoint must not tie them.
        """
        apart = []
        for alias, kept in self.tied.items():
            if alias in self._recipes and kept in self._recipes and not self._equal(alias, kept):
                apart.append(alias)
        return apart

    def _equal(self, one: str, other: str) -> bool:
        first, second = (self._read(self._single_source(name)) for name in (one, other))
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        rows = max(1, (16 << 20) // max(1, first[0].nbytes))
        return all(torch.equal(a, b) for a, b in zip(first.split(rows), second.split(rows), strict=True))

    def _single_source(self, name: str) -> str:
        return next(iter(self._recipes[name].sources.values()))[0]

    def shape(self, fqn: str) -> tuple[int, ...]:
        """Shape of a parameter, without reading it."""
        return tuple(self._meta(fqn).shape)

    def tensor(self, fqn: str) -> torch.Tensor:
        """Read one parameter in the dtype it is stored in.

        Args:
            fqn: Name in the model's state dict; tied names give the same tensor.

        Returns:
            A CPU tensor.

        Raises:
            InvalidInputError: No such parameter, or its stored tensors do not make up its shape.
        """
        expected = tuple(self._meta(fqn).shape)
        recipe = self._recipes[self._source_of(fqn)]
        if fqn in self._siblings:
            value = self._siblings.pop(fqn)
        else:
            groups = {key: [self._read(name) for name in names] for key, names in recipe.sources.items()}
            made = convert(recipe, groups, self._model)
            name = fqn if fqn in made else self._source_of(fqn)
            if name not in made:
                raise InvalidInputError(f"{self.folder}: converting {recipe.first} does not give {fqn}")
            value = made.pop(name)
            # what a split made besides is asked for next; only the latest is kept
            self._siblings = made
        if tuple(value.shape) != expected:
            raise InvalidInputError(
                f"{self.folder}: {fqn} has shape {tuple(value.shape)}, the model wants {expected}"
            )
        return value

    def _meta(self, fqn: str) -> torch.Tensor:
        if fqn not in self._wanted:
            raise InvalidInputError(f"{type(self._model).__name__} has no parameter {fqn!r}")
        return self._wanted[fqn]

    def _source_of(self, fqn: str) -> str:
        """The name among the tied ones for which the checkpoint holds a tensor."""
        if fqn in self._recipes:
            return fqn
        kept = self._tied.get(fqn, fqn)
        return next(n for n, k in self._tied.items() if k == kept and n in self._recipes)

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(name, self._stored[name])

    def _check(self) -> None:
        missing = [n for n in self._wanted if n not in self._recipes and not self._has_tied_source(n)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InvalidInputError(
                f"{self.folder} holds no {missing[0]!r}{more}, which {type(self._model).__name__} needs",
                hint="Is the checkpoint complete, and does config.json belong to it?",
            )
        for name, recipe in self._recipes.items():
            if recipe.converter is None:
                [source] = recipe.sources.values()
                shape = self._stored[source[0]].shape
                if shape != tuple(self._wanted[name].shape):
                    raise InvalidInputError(
                        f"{self.folder}: {source[0]!r} has shape {shape}, "
                        f"but config.json makes {name} {tuple(self._wanted[name].shape)}"
                    )

    def _has_tied_source(self, name: str) -> bool:
        kept = self._tied.get(name)
        return kept is not None and any(k == kept and n in self._recipes for n, k in self._tied.items())


def _tied_names(
    model: PreTrainedModel, wanted: dict[str, torch.Tensor], recipes: dict[str, Recipe]
) -> dict[str, str]:
    """Name → first name, for every parameter that the model holds under several names."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted:
            by_id.setdefault(id(parameter), []).append(name)
    return {name: names[0] for names in by_id.values() if len(names) > 1 for name in names}
