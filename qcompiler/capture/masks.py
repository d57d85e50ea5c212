"""Reads which keys a query may see out of the mask function that transformers composes; builds no mask.

Transformers asks a registered mask interface for every mask and hands it a
`mask_function(batch, head, q, kv) -> bool` composed of a few named building
blocks (`transformers.masking_utils`). Causal, sliding window, chunk and
bidirectional blocks become a `MaskSpec`; a block we do not know (an overlay for
image tokens, a model's own rule) has no place in one attention op and is refused.

The spec travels to the attention function on the mask tensor itself, so every
layer gets the mask that the model gave to that layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from qcompiler.kernels.errors import UnsupportedModelError

_MODULE = "transformers.masking_utils"
_SPEC_ATTRIBUTE = "_qcompiler_mask"


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query sees.

    Attributes:
        causal: Only keys at or before the query.
        window: Causal: `i - j < window`; bidirectional: `|i - j| <= window`. 0 is no window.
        chunk: Only keys of the same chunk, `i // chunk == j // chunk`. 0 is no chunks.
    """

    causal: bool = False
    window: int = 0
    chunk: int = 0


def mask_interface(
    *,
    batch_size: int,
    q_length: Any,
    kv_length: Any,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    device: Any = None,
    **_: Any,
) -> torch.Tensor:
    """What transformers calls for a mask: an empty tensor of the mask's shape that carries a `MaskSpec`.

    A mask that has no spec carries the refusal instead, which is raised where a layer uses it: models also
    make masks that none of their layers takes.
    """
    spec: MaskSpec | UnsupportedModelError
    try:
        if attention_mask is not None and not _is_all_ones(attention_mask):
            raise UnsupportedModelError(
                "it builds a padding mask of its own, which a graph over ragged tokens has no place for"
            )
        for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset)):
            if not isinstance(offset, int) or offset != 0:
                raise UnsupportedModelError(
                    f"it asks for a mask with {name}={offset} although no cache is used"
                )
        spec = describe(mask_function)
    except UnsupportedModelError as refusal:
        spec = refusal
    mask = torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device=device)
    setattr(mask, _SPEC_ATTRIBUTE, spec)
    return mask


def spec_of(mask: torch.Tensor) -> MaskSpec | None:
    """The spec that `mask_interface` put on a mask; None if the tensor is not (or no longer) such a mask.

    Raises:
        UnsupportedModelError: The mask is made of parts that the attention op cannot express.
    """
    spec = getattr(mask, _SPEC_ATTRIBUTE, None)
    if isinstance(spec, UnsupportedModelError):
        raise spec
    return spec


def _is_all_ones(mask: torch.Tensor) -> bool:
    """Whether a traced mask was made as ones: models fill in the padding mask that they were not given."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(mask, mode.tracer, None)
    node = getattr(getattr(slot, "proxy", None), "node", None)
    while isinstance(node, fx.Node) and str(node.target) in _COPIES:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    if node.target in (torch.ops.aten.full.default, torch.ops.aten.full_like.default):
        return node.args[1] in (1, True)
    return str(node.target) in ("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")


def describe(mask_function: Callable[..., Any]) -> MaskSpec:
    """The spec of a composed transformers mask function.

    Raises:
        UnsupportedModelError: A building block is unknown, or the combination has no spec.
    """
    causal, overlays = False, []
    for name, cells in _leaves(mask_function):
        if name == "causal_mask_function":
            causal = True
        elif name in _OVERLAYS:
            overlays.append((name, *(cells[key] for key in _OVERLAYS[name])))
        elif name not in _IRRELEVANT:
            raise UnsupportedModelError(
                f"the attention mask contains the rule {name!r}, which the attention op cannot express"
            )
    spec = MaskSpec(causal=causal)
    for name, size in overlays:
        bidirectional = name == "sliding_window_bidirectional_overlay.<locals>.inner_mask"
        field = "chunk" if name.startswith("chunked") else "window"
        if bidirectional == causal and field == "window":
            raise UnsupportedModelError(
                f"the mask combines {'causal' if causal else 'bidirectional'} attention with {name!r}"
            )
        if not isinstance(size, int) or size <= 0:
            raise UnsupportedModelError(f"the attention mask has a {field} of {size!r}")
        if getattr(spec, field) not in (0, size):
            raise UnsupportedModelError(
                f"the attention mask combines {field}s {getattr(spec, field)} and {size}"
            )
        spec = replace(spec, window=size) if field == "window" else replace(spec, chunk=size)
    return spec


# Ops through which ones stay ones.
_COPIES = {
    "aten.to.dtype",
    "aten.to.device",
    "aten.to.dtype_layout",
    "aten.expand.default",
    "aten._to_copy.default",
}
# Building block -> the closure cells that hold its sizes.
_OVERLAYS = {
    "sliding_window_overlay.<locals>.inner_mask": ("sliding_window",),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": ("sliding_window",),
    "chunked_overlay.<locals>.inner_mask": ("chunk_size",),
}
# All keys visible; or a separation of packed sequences, which a ragged batch has anyway.
_IRRELEVANT = {"bidirectional_mask_function", "packed_sequence_mask_function.<locals>.inner_mask"}
# Wrappers -> the closure cell with what they wrap.
_WRAPPERS = {
    "and_masks.<locals>.and_mask": "mask_functions",
    "remap_positions_for_packed_sequence.<locals>.inner_mask": "mask_function",
}


def _leaves(function: Callable[..., Any]) -> list[tuple[str, dict[str, Any]]]:
    name = getattr(function, "__qualname__", type(function).__name__)
    if getattr(function, "__module__", None) != _MODULE:
        return [(f"{getattr(function, '__module__', '?')}.{name}", {})]
    names = function.__code__.co_freevars
    cells = {key: cell.cell_contents for key, cell in zip(names, function.__closure__ or (), strict=True)}
    if name not in _WRAPPERS:
        return [(name, cells)]
    inner = cells[_WRAPPERS[name]]
    inner = inner if isinstance(inner, (tuple, list)) else (inner,)
    return [leaf for part in inner for leaf in _leaves(part)]
