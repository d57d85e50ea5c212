"""The attention implementation that models are built with for capture: each attention becomes one op call.

Registered with transformers' `AttentionInterface` under `IMPLEMENTATION`. The
op sees the un-repeated key and value heads. What an attention is passed and the
op cannot express (a position bias, a mask of the model's own, dropout) is
refused by name rather than dropped.
"""

from __future__ import annotations

from typing import Any

import torch

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.capture.masks import MaskSpec, mask_interface, spec_of
from qcompiler.kernels.errors import UnsupportedModelError

IMPLEMENTATION = "qcompiler"

# Passed along by models for other attention implementations or for bookkeeping; no effect on the numbers.
_INERT = frozenset(
    {
        "position_ids",
        "cache_position",
        "position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "return_dict",
        "layer_idx",
        "num_items_in_batch",
        "deterministic",
    }
)


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_interface)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function in transformers' calling convention that emits `qcompiler::attention`.

    Args:
        module: The attention module.
        query: [1, query heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, Dv].
        attention_mask: A mask of `mask_interface`, or None.
        scaling: Factor on q·k; 1/sqrt(D) if None.
        dropout: Must be 0.
        sliding_window: The window the model believes in; checked against the mask's.
        softcap: s → softcap·tanh(s/softcap); None is off.
        s_aux: Attention sinks, one logit per query head.
        is_causal: Used when there is no mask.
        **others: Refused unless None, False, or known to be inert.

    Returns:
        The attention output [1, T, query heads, Dv], and None for the attention weights.

    Raises:
        UnsupportedModelError: The attention is more than the op can express; names what.
    """
    where = type(module).__name__
    for name, given in others.items():
        if name not in _INERT and given is not None and given is not False:
            raise UnsupportedModelError(
                f"{where} passes {name!r} to its attention, which the attention op cannot express"
            )
    if dropout:
        raise UnsupportedModelError(f"{where} applies dropout {dropout} in its attention outside of training")
    spec = _visibility(module, attention_mask, sliding_window, is_causal)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if s_aux is not None:
        s_aux = s_aux.reshape(-1)
    output = torch.ops.qcompiler.attention(
        query, key, value, scale, spec.causal, spec.window, spec.chunk, float(softcap or 0.0), s_aux
    )
    return output, None


def _visibility(
    module: torch.nn.Module, mask: torch.Tensor | None, sliding_window: int | None, is_causal: bool | None
) -> MaskSpec:
    """What the queries see: the mask's word where there is one, else `is_causal` as SDPA takes it."""
    where = type(module).__name__
    window = int(sliding_window or 0)
    if mask is not None:
        spec = spec_of(mask)
        if spec is None:
            raise UnsupportedModelError(
                f"{where} is given an attention mask that the model computed itself "
                "(an ALiBi or other bias); the attention op takes none"
            )
        # The mask is what the eager implementation obeys, the argument what flash attention obeys.
        if spec.causal and window and spec.window != window:
            raise UnsupportedModelError(
                f"{where} has a mask with window {spec.window} but is called with sliding_window={window}"
            )
        return spec
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", None)
    if causal is None:
        raise UnsupportedModelError(
            f"{where} says neither by a mask nor by is_causal which keys its queries see"
        )
    if window and not causal:
        raise UnsupportedModelError(
            f"{where} is bidirectional with sliding_window={window} but without a mask"
        )
    return MaskSpec(causal=bool(causal), window=window)
