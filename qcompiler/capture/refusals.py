"""What can be told from a model's structure before it is traced: layers whose state is no key/value cache.

Each rule looks at a mechanism (a convolution over tokens, a layer type of the
config, a missing argument), never at a model's name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qcompiler.kernels.errors import UnsupportedModelError

# Values of `config.layer_types` (and older spellings of that attribute) that mean softmax attention.
_ATTENTION_LAYERS = frozenset(
    {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "attention",
        "global",
        "local",
        "full",
        "sliding",
    }
)
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")


def refuse_by_structure(model: Any) -> None:
    """Refuse models with layers that are not attention over a key/value cache.

    Args:
        model: A transformers model on the meta device.

    Raises:
        UnsupportedModelError: Names the layers and the mechanism.
    """
    for attribute in _LAYER_LISTS:
        kinds = getattr(model.config, attribute, None)
        used = kinds if isinstance(kinds, (list, tuple)) else ()
        other = sorted({str(kind) for kind in used[: model.config.num_hidden_layers]} - _ATTENTION_LAYERS)
        if other:
            raise UnsupportedModelError(
                f"some of its layers are {', '.join(other)} ({attribute}): their state is no cache "
                "of keys and values (recurrent or linear attention)"
            )
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)) and max(module.kernel_size) > 1:
            raise UnsupportedModelError(
                f"{name} is a convolution over tokens, as in state-space and linear-attention layers, "
                "whose state is not a cache of keys and values"
            )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        kind = "ALiBi" if _has_alibi(model) else "recurrent layers, or positions it counts itself"
        raise UnsupportedModelError(
            f"its forward takes no position_ids ({kind}), "
            "so several sequences cannot stand end to end in one batch row"
        )


def _has_alibi(model: Any) -> bool:
    attention = getattr(model.config, "attn_config", None)
    if getattr(model.config, "alibi", False) or getattr(attention, "alibi", False):
        return True
    return any(
        hasattr(module, "build_alibi_tensor") or hasattr(module, "build_mpt_alibi_tensor")
        for module in model.modules()
    )
