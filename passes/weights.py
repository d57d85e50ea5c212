"""How the tensors of a rewritten graph come from the checkpoint: recipes, so that weights can stay on meta.

A pass that changes weights registers the new tensor's shape on the graph module
and writes down in `gm.meta["weight_recipes"]` how to make it. `resolve` follows
one recipe; a streamed compile does so tensor by tensor, with no more than one
layer in memory. Where the graph holds real weights, the passes compute at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.passes.graph_utils import get_attribute, set_attribute


@dataclass(frozen=True)
class Loaded:
    """A tensor of the checkpoint, named as the captured graph named it.

    Attributes:
        source: Name in the captured module.
        transposed: Swap its two dimensions (GPT-2's Conv1D keeps [in, out]).
    """

    source: str
    transposed: bool = False


@dataclass(frozen=True)
class Zeros:
    """Zeros, where one of several concatenated linears has no bias."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Quantized:
    """One stored tensor of a quantized weight.

    Attributes:
        source: How to make the float weight [out_features, in_features].
        format: Name of the storage format.
        spec: The format's own spec, e.g. `AffineSpec`.
        part: Which of the format's tensors: "low", "high", "scales", "zeros" for affine.
        name: Name of the linear, by which per-layer choices are made.
    """

    source: Recipe
    format: str
    spec: Any
    part: str
    name: str = ""


@dataclass(frozen=True)
class ExpertRows:
    """Expert weights [experts, out, in] as one matrix [experts·out, in].

    Attributes:
        source: How to make the 3-D weight.
        transposed: It is [experts, in, out].
    """

    source: Recipe
    transposed: bool = False


@dataclass(frozen=True)
class Concat:
    """Tensors side by side along `dim`."""

    parts: tuple[Recipe, ...]
    dim: int = 0


Recipe = Loaded | Zeros | Quantized | ExpertRows | Concat
Load = Callable[[str], torch.Tensor]
Quantize = Callable[[Quantized], Mapping[str, torch.Tensor]]


def weight_recipes(gm: GraphModule) -> dict[str, Recipe]:
    """The module's table of recipes; a tensor without an entry is loaded under its own name."""
    return gm.meta.setdefault("weight_recipes", {})


def recipe_of(gm: GraphModule, fqn: str) -> Recipe:
    """How to make the tensor `fqn`."""
    return weight_recipes(gm).get(fqn, Loaded(fqn))


def sources(recipe: Recipe) -> list[str]:
    """Names of the checkpoint tensors that a recipe reads, in order."""
    if isinstance(recipe, Loaded):
        return [recipe.source]
    if isinstance(recipe, (Quantized, ExpertRows)):
        return sources(recipe.source)
    if isinstance(recipe, Concat):
        return [name for part in recipe.parts for name in sources(part)]
    return []


def resolve(recipe: Recipe, load: Load, quantize: Quantize | None = None) -> torch.Tensor:
    """Evaluate a recipe.

    Args:
        recipe: What to make.
        load: Tensor of the checkpoint by its name in the captured module.
        quantize: Stored tensors by part for one `Quantized` (its `part` aside); called once for
            each part, so a caller that streams keeps the last answer.

    Raises:
        InvalidInputError: The recipe quantizes and no `quantize` was given, or a part is missing.
    """
    if isinstance(recipe, Loaded):
        tensor = load(recipe.source)
        return tensor.t().contiguous() if recipe.transposed else tensor
    if isinstance(recipe, Zeros):
        return torch.zeros(recipe.shape, dtype=recipe.dtype)
    if isinstance(recipe, ExpertRows):
        stacked = resolve(recipe.source, load, quantize)
        return (stacked.transpose(1, 2) if recipe.transposed else stacked).flatten(0, 1)
    if isinstance(recipe, Concat):
        return _beside([resolve(part, load, quantize) for part in recipe.parts], recipe)
    if quantize is None:
        raise InvalidInputError(
            f"{recipe.name or recipe.source}: its weight is to be quantized, but no quantizer was given",
            hint="Pass quantize=… to resolve.",
        )
    tensors = quantize(recipe)
    if recipe.part not in tensors:
        raise InvalidInputError(
            f"{recipe.name}: the quantizer gave {sorted(tensors)} but no {recipe.part!r}",
            hint=f"Format {recipe.format} stores it; see the format's tensor_specs.",
        )
    return tensors[recipe.part]


def _beside(tensors: list[torch.Tensor], recipe: Concat) -> torch.Tensor:
    """Parts in one tensor, on the device of those that were loaded: zeros were made on none."""
    loaded = [t.device for t, part in zip(tensors, recipe.parts, strict=True) if not isinstance(part, Zeros)]
    return torch.cat([t.to(loaded[0]) if loaded else t for t in tensors], dim=recipe.dim)


def register_weight(gm: GraphModule, fqn: str, recipe: Recipe, tensor: torch.Tensor) -> None:
    """Hold a new weight on the module and note how it is made.

    Args:
        gm: The graph module.
        fqn: The new tensor's name.
        recipe: How it is made from the checkpoint.
        tensor: Its value, or its shape on meta.
    """
    set_attribute(gm, fqn, tensor)
    weight_recipes(gm)[fqn] = recipe


def weight_of(gm: GraphModule, fqn: str) -> torch.Tensor:
    """The tensor that the module holds under `fqn`, real or meta."""
    tensor = get_attribute(gm, fqn)
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(f"the graph holds no tensor named {fqn}")
    return tensor


def layer_name(fqn: str) -> str:
    """Name of the layer that a weight belongs to: `model.layers.0.mlp.up_proj.weight` → `….up_proj`."""
    head, _, tail = fqn.rpartition(".")
    return head if head and tail.split("_")[0] == "weight" else fqn
