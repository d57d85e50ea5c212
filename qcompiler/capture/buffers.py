"""Real values for the buffers that no checkpoint holds (`inv_freq`, position tables, …).

They are computed the way `from_pretrained` computes them: the owning module is
handed to the model's `_init_weights` with its buffers on the CPU. A buffer that
this leaves unwritten is refused by name; an unwritten value is told apart by
filling the buffers with two different patterns beforehand.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from qcompiler.kernels.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def materialize_buffers(model: PreTrainedModel, names: set[str]) -> dict[str, torch.Tensor]:
    """Compute non-persistent buffers of a meta model on the CPU.

    Args:
        model: A model on the meta device; it is not changed.
        names: Fully qualified names of the wanted buffers.

    Returns:
        Name → CPU tensor of the buffer's shape and dtype.

    Raises:
        UnsupportedModelError: The model's initialisation does not write a wanted buffer.
    """
    values: dict[str, torch.Tensor] = {}
    by_module: dict[str, list[str]] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, []).append(leaf)
    for path, leaves in by_module.items():
        module = model.get_submodule(path)
        first, second = (_initialized(model, module, fill) for fill in (0, 1))
        for leaf in leaves:
            if not torch.equal(first[leaf], second[leaf]):
                raise UnsupportedModelError(
                    f"{model.config.model_type}: buffer {path}.{leaf} is in no checkpoint and "
                    f"{type(model).__name__}'s initialisation does not compute it"
                )
            values[f"{path}.{leaf}" if path else leaf] = first[leaf]
    return values


@torch.no_grad()
def _initialized(model: PreTrainedModel, module: torch.nn.Module, fill: int) -> dict[str, torch.Tensor]:
    double = copy.copy(module)
    double._buffers = {
        name: None if value is None else torch.full(value.shape, fill, dtype=value.dtype, device="cpu")
        for name, value in module._buffers.items()
    }
    model._init_weights(double)
    return {name: value for name, value in double._buffers.items() if value is not None}
