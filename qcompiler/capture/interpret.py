"""Executes a captured graph with given weights in plain torch: the yardstick for passes and runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


class GraphRunner(fx.Interpreter):
    """Runs a captured graph on real tensors.

    Args:
        gm: A captured graph; its weights may be meta tensors.
        weights: Gives the tensor of a state-dict name; asked only for attributes that are meta tensors.
        device: Where to compute.
        lengths: Tokens of each sequence laid end to end; None for a single sequence.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        weights: Callable[[str], torch.Tensor],
        device: torch.device | str = "cpu",
        lengths: Sequence[int] | None = None,
    ):
        super().__init__(gm, garbage_collect_values=True)
        self.weights = weights
        self.device = torch.device(device)
        self.lengths = lengths
        self._loaded: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def logits(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The graph's output for ids, positions and, where it has them, token types, each [1, T]."""
        return self.run(*(value.to(self.device) for value in inputs))

    def fetch_attr(self, target: str) -> Any:
        """The tensor of a `get_attr` node, on the device."""
        if target not in self._loaded:
            held = super().fetch_attr(target)
            value = self.weights(target) if held.is_meta else held
            self._loaded[target] = value.to(self.device)
        return self._loaded[target]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One op; attention is cut at the sequence boundaries."""
        if self.lengths is not None and target is torch.ops.qcompiler.attention.default:
            return self._ragged(args)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._place)
        return super().call_function(target, args, kwargs)

    def _place(self, value: Any) -> Any:
        return self.device if isinstance(value, torch.device) else value

    def _ragged(self, args: tuple[Any, ...]) -> torch.Tensor:
        q, k, v, *options = args
        pieces = zip(*(tensor.split(list(self.lengths or ()), dim=2) for tensor in (q, k, v)), strict=True)
        return torch.cat([torch.ops.qcompiler.attention(*piece, *options) for piece in pieces], dim=1)
