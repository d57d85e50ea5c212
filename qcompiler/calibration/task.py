"""What a calibrated method is given and gives: a block at a time, as weights, moments and a function.

A method that needs calibration text implements `quantize_block`; it sees no
graph. `Moments` are the second moments of a linear's input over the text:

    gram  = XᵀX / tokens          X: inputs as the quantized prefix gives them
    cross = XᵀX₀ / tokens         X₀: the same inputs in the original model

so that ‖X₀Wᵀ − XŴᵀ‖² is minimised by rounding W·crossᵀ·gram⁻¹ in the norm of gram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from qcompiler.calibration.blocks import Block, Linear

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Moments:
    """Second moments of one linear's input, float32 [K, K]; see the top of this file."""

    gram: torch.Tensor
    cross: torch.Tensor | None
    tokens: int


@dataclass
class BlockResult:
    """What a method made of a block.

    Attributes:
        tensors: Linear name → the stored tensors of its format.
        specs: Linear name → the spec that they were stored with.
        weights: Float tensors by name in the graph that stand for the block from now on: the dequantized
            weights, and norms or biases that were tuned (those are the artifact's new values).
        info: Figures for the report; JSON-able.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    specs: dict[str, Any]
    weights: dict[str, torch.Tensor]
    info: dict[str, Any] = field(default_factory=dict)


class BlockTask:
    """One block with its calibration inputs.

    Attributes:
        name: Module path of the block.
        linears: The linears to quantize, name → linear.
        specs: Linear name → spec chosen for it.
        weights: The block's float tensors by name in the graph, float32, on `device`.
        windows: Number of calibration windows.
        device: Where the tensors are.
        seed: For every random choice.
        options: The method's options.
    """

    def __init__(
        self,
        block: Block,
        specs: Mapping[str, Any],
        weights: dict[str, torch.Tensor],
        inputs: Sequence[Mapping[Any, Any]],
        originals: Sequence[Mapping[Any, Any]] | None,
        run: Callable[..., dict[Any, Any]],
        device: torch.device,
        stream_dtype: torch.dtype,
        seed: int,
        options: Mapping[str, Any],
        tell: Callable[[str], None],
    ):
        self.name = block.name
        self.linears = {linear.name: linear for linear in block.linears if linear.name in specs}
        self.specs = dict(specs)
        self.weights = weights
        self.windows = len(inputs)
        self.device = device
        self._stream_dtype = stream_dtype
        self.seed = seed
        self.options = dict(options)
        self.tell = tell
        self._block = block
        self._inputs = inputs
        self._originals = originals
        self._run = run
        self._targets: dict[int, tuple[torch.Tensor, ...]] = {}

    def stages(self) -> list[list[Linear]]:
        """Linears to quantize that share an input, in the order in which their inputs become known."""
        stages = [[x for x in stage if x.name in self.linears] for stage in self._block.stages()]
        return [stage for stage in stages if stage]

    def tunable(self) -> list[str]:
        """Names of the float vectors of the block (norms, biases) that fine-tuning may move."""
        return [
            name
            for name, tensor in self.weights.items()
            if tensor.dim() == 1
            and tensor.is_floating_point()
            and name.rpartition(".")[2] in ("weight", "bias")
        ]

    @torch.no_grad()
    def moments(
        self,
        stage: Sequence[Linear],
        current: Tensors | None = None,
        weights: Callable[[int], torch.Tensor] | None = None,
    ) -> Moments:
        """Moments of the input that the linears of a stage share.

        Args:
            stage: Linears of one stage.
            current: Tensors by name that replace the block's own (linears quantized so far).
            weights: Window → how much each of its tokens counts, [T]; all the same if None.
        """
        value = stage[0].input
        size = stage[0].in_features
        gram = torch.zeros(size, size, device=self.device)
        cross = torch.zeros_like(gram) if self._originals is not None else None
        tokens = 0
        nodes = self._block.until(value)
        for index in range(self.windows):
            x = self._value(nodes, self._inputs[index], value, current)
            weighted = x if weights is None else x * weights(index)[:, None]
            gram.addmm_(weighted.T, x)
            if cross is not None and self._originals is not None:
                cross.addmm_(weighted.T, self._value(nodes, self._originals[index], value, None))
            tokens += x.shape[0]
        return Moments(gram / tokens, None if cross is None else cross / tokens, tokens)

    def forward(self, window: int, current: Tensors | None = None) -> tuple[torch.Tensor, ...]:
        """The block's float outputs for a window on the quantized prefix; differentiable in `current`."""
        return self._outputs(self._inputs[window], current)

    @torch.no_grad()
    def target(self, window: int) -> tuple[torch.Tensor, ...]:
        """What the block should give for that window: the outputs of its float weights.

        They are computed on the original model's stream where the runner keeps it, else on the
        quantized prefix; once per window, then kept as the inputs are.
        """
        if window not in self._targets:
            source = self._inputs if self._originals is None else self._originals
            outputs = self._outputs(source[window], None)
            self._targets[window] = tuple(value.to(self._stream_dtype) for value in outputs)
        return tuple(value.float() for value in self._targets[window])

    @torch.no_grad()
    def token_weights(self, window: int) -> torch.Tensor:
        """The inverse squared size of what the block should give at each token, [T].

        The norm that reads the stream next divides by that size, and a few tokens (attention sinks) are
        many times larger than the rest.
        """
        sizes = sum(value.square().sum(-1).flatten() for value in self.target(window))
        return 1.0 / (sizes + 1e-6 * sizes.mean())  # type: ignore[union-attr]

    def _outputs(self, given: Mapping[Any, Any], current: Tensors | None) -> tuple[torch.Tensor, ...]:
        values = self._run(self._block.nodes, given, self._fetch(current), self._block.writes)
        return tuple(
            value
            for value in values.values()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        )

    def _value(
        self, nodes: Sequence[Any], given: Mapping[Any, Any], wanted: Any, current: Tensors | None
    ) -> torch.Tensor:
        value = self._run(nodes, given, self._fetch(current), [wanted])[wanted]
        return value.reshape(-1, value.shape[-1]).float()

    def _fetch(self, current: Tensors | None) -> Callable[[str], torch.Tensor]:
        if not current:
            return self.weights.__getitem__
        return lambda name: current[name] if name in current else self.weights[name]


class BlockQuantizer(Protocol):
    """What the runner asks of a method; `qcompiler.methods.calibrated.CalibratedMethod` is one."""

    @property
    def name(self) -> str:
        """The method's name, for messages."""
        ...

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """Quantize `task.linears`; must depend on nothing but the task."""
        ...


__all__ = ["BlockQuantizer", "BlockResult", "BlockTask", "Moments", "Tensors"]
