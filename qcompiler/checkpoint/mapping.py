"""Which stored tensors make up each parameter of a transformers model, and how.

transformers 5 keeps models in another layout than many checkpoints: prefixes
come and go, per-expert matrices are stacked into 3-D parameters, packed
projections are split. Its own conversion tables (`conversion_mapping`) say how;
this module groups the stored names by the parameter they belong to, so that one
parameter can be read at a time.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Recipe:
    """How parameters come out of stored tensors.

    Attributes:
        sources: Pattern (or, without a converter, the stored name) → stored names, in order.
        converter: transformers' converter; None for a rename.
        first: The first parameter name that the converter makes, by which it names the others.
    """

    first: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None


def build_recipes(model: PreTrainedModel, stored: list[str]) -> tuple[dict[str, Recipe], list[str]]:
    """Parameter name → recipe, and the stored names that no parameter wants.

    A converter that makes several parameters (a packed projection that is split) has one recipe under
    each of their names.

    Args:
        model: The model on the meta device.
        stored: Names in the checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    recipes: dict[str, Recipe] = {}
    unused: list[str] = []
    for name in sorted(stored, key=_natural):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = name, None
        if renamed not in wanted:
            unused.append(name)
            continue
        recipe = recipes.setdefault(renamed, Recipe(first=renamed))
        if pattern is not None and recipe.converter is None:
            recipe.converter = copy.deepcopy(by_pattern[pattern])
        group = recipe.sources.setdefault(pattern or name, [])
        if pattern is None and len(recipe.sources) > 1:
            others = [n for names in recipe.sources.values() for n in names if n != name]
            raise InvalidInputError(f"stored tensors {others[0]!r} and {name!r} both claim to be {renamed!r}")
        group.append(name)
    for recipe in list(recipes.values()):
        for target in _targets(recipe):
            recipes.setdefault(target, recipe)
    return recipes, unused


def convert(recipe: Recipe, tensors: dict[str, list[Any]], model: PreTrainedModel) -> dict[str, Any]:
    """Run a recipe: pattern → stored tensors in, parameter name → tensor out.

    Raises:
        InvalidInputError: The converter refuses the tensors (shapes or numbers that do not fit).
    """
    if recipe.converter is None:
        return {recipe.first: next(iter(tensors.values()))[0]}
    converter = copy.deepcopy(recipe.converter)
    for pattern, group in tensors.items():
        converter.collected_tensors[pattern] = group
    try:
        made = converter.convert(recipe.first, model=model, config=model.config)
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        raise InvalidInputError(
            f"{recipe.first} cannot be put together from its stored tensors: {error}"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _targets(recipe: Recipe) -> list[str]:
    if recipe.converter is None:
        return [recipe.first]
    patterns = recipe.converter.target_patterns
    lead = next((p for p in patterns if p in recipe.first), None)
    if lead is None:
        return [recipe.first]
    return [recipe.first.replace(lead, pattern, 1) for pattern in patterns]


def _natural(name: str) -> list[tuple[int, Any]]:
    """Sort key that puts expert 10 after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
