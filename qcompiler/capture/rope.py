"""Rotary embeddings whose frequencies depend on the sequence length: frozen on request, refused otherwise.

`dynamic` (NTK) and `longrope` recompute their frequencies from the longest
position in the batch. In a ragged batch that would let one sequence change
another, so one graph holds one set of frequencies, chosen by `max_context`:
up to the original context length both types use their base frequencies, which
is exact; beyond it longrope's long factors hold for every length (as its
authors' own long-context checkpoints are served), while dynamic NTK has no
single set and stays refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qcompiler.kernels.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Frequencies are a function of the config alone.
_STATIC = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


def rope_types(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Layer type ("" if there is but one) → rotary parameters, each with its `rope_type`."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters or "type" in parameters:
        return {"": dict(parameters)}
    return {key: dict(value) for key, value in parameters.items() if isinstance(value, dict)}


def freeze_rope(model: PreTrainedModel, max_context: int | None) -> dict[str, torch.Tensor]:
    """Stop length-dependent rotary modules from recomputing their frequencies.

    Args:
        model: A meta model; its rotary modules are changed so that their forward is static.
        max_context: The longest sequence that the compiled model is meant for, in tokens.

    Returns:
        Buffer name → frequencies, where they differ from the model's initial ones.

    Raises:
        UnsupportedModelError: A type is unknown, or `max_context` does not settle its frequencies.
    """
    frozen: dict[str, torch.Tensor] = {}
    for label, parameters in rope_types(model.config).items():
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind in _STATIC:
            continue
        where = f"{model.config.model_type}: rotary type {kind!r}"
        if kind not in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{where} is not one of {sorted(_STATIC)} and may depend on the length"
            )
        original = _original_context(model.config, parameters, kind)
        limit = original if kind == "dynamic" else model.config.max_position_embeddings
        if max_context is None or max_context > limit:
            raise UnsupportedModelError(
                f"{where} changes its frequencies with the length of the sequence "
                f"(original context {original} tokens)",
                hint=f"Choose the longest context, max_context, at most {limit}: up to {original} is exact"
                + ("." if kind == "dynamic" else "; beyond, the long factors serve every length."),
            )
        if label:
            raise UnsupportedModelError(f"{where} for {label!r} layers only is not supported")
        module: Any
        for path, module in model.named_modules():
            if getattr(module, "rope_type", None) != kind:
                continue
            module.rope_type = "default"  # transformers' per-call update looks at this and nothing else
            if kind == "longrope" and max_context > original:
                from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

                values, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](
                    module.config, torch.device("cpu"), seq_len=max_context
                )
                frozen[f"{path}.inv_freq"] = values
            else:
                frozen[f"{path}.inv_freq"] = _base_frequencies(module, kind)
    return frozen


def _original_context(config: PreTrainedConfig, parameters: dict[str, Any], kind: str) -> int:
    if kind == "dynamic":
        return int(config.max_position_embeddings)
    return int(
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def _base_frequencies(module: Any, kind: str) -> torch.Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values, module.attention_scaling = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"))
    return values
