"""What an error at a linear's output costs in KL divergence, to second order, from one pass back over text.

Let y be the output of a linear at token t, and g the gradient there of Σ log p(label), a label drawn at each
position from the model's own distribution. The expectation of (gᵀδ)² is then the Fisher information in the
direction δ, and half of it is, to second order, what an error δ = (Ŵ − W)·x adds to KL(original ‖ changed),
in nats per token:

    KL ≈ ½ · mean over tokens of (gᵀ(Ŵ − W)x)²

Tokens are taken one by one (errors at two of them as unrelated), and layers add up. Only the values at the
borders between blocks are kept; each block is run again, with gradients, on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompiler.calibration.blocks import Block, Linear, cut_blocks, run_nodes
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.passes.weights import recipe_of, resolve

_HALVES = dict.fromkeys((torch.bfloat16, torch.float16), torch.float32)


@dataclass
class Observed:
    """One linear over the whole text.

    Attributes:
        linear: The linear.
        weight: Its float weight, float32 [N, K].
        inputs: x, float32 [tokens, K].
        gradients: g, float32 [tokens, N].
        share: Of the linear's rows, where only some are looked at.
    """

    linear: Linear
    weight: Tensor
    inputs: Tensor
    gradients: Tensor
    share: float = 1.0

    def rows(self, most: int) -> Observed:
        """The same with no more than so many rows of the weight, evenly spread."""
        count = self.weight.shape[0]
        if count <= most:
            return self
        kept = torch.linspace(0, count - 1, most, dtype=torch.float64).round().long().to(self.weight.device)
        return Observed(
            self.linear, self.weight[kept], self.inputs, self.gradients[:, kept], self.share * most / count
        )

    def cost(self, restored: Tensor) -> float:
        """KL in nats per token that `restored` [N, K] in the weight's place is expected to add.

        Of some rows only it is what all of them would add, errors of different rows being unrelated.
        """
        errors = self.inputs @ (restored - self.weight).T
        along = (errors * self.gradients).sum(dim=1, dtype=torch.float64)
        return float(along.square().mean()) / 2 / self.share


def observe(
    gm: GraphModule,
    load: Callable[[str], Tensor],
    windows: Sequence[Tensor],
    wanted: frozenset[str],
    *,
    device: torch.device,
    seed: int = 0,
    on_step: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, list[Observed]]]:
    """Yield (block name, its observed linears), from the last block to the first; then what lies behind them.

    Args:
        gm: A captured decoder in canonical form; its weights may be on meta.
        load: Checkpoint tensor by name.
        windows: The text, int64 [1, T] each, all equally long.
        wanted: Names of the linears to observe.
        device: Where to compute.
        seed: For the labels.
        on_step: Called after each piece, there and back.

    Raises:
        UnsupportedModelError: The graph cannot be cut into blocks.
    """
    run = _Pieces(gm, load, device)
    tell = on_step or (lambda _name: None)
    before: list[list[dict[Node, Any]]] = []  # piece → window → what it reads
    streams: list[dict[Node, Any]] = [run.inputs(window) for window in windows]
    for index, piece in enumerate(run.pieces[:-1]):
        weights = run.weights_of(piece)
        later = {node for following in run.pieces[index + 1 :] for node in following.reads}
        before.append([{node: values[node] for node in piece.reads} for values in streams])
        for values in streams:
            with torch.no_grad():
                wanted_here = [node for node in piece.writes if node in later]
                made = run_nodes(
                    piece.nodes, values, weights.__getitem__, wanted_here, dtypes=_HALVES, device=device
                )
            values.update(made)
            for node in [node for node in values if node not in later]:
                del values[node]
        tell(piece.name)
    before.append([{node: values[node] for node in run.pieces[-1].reads} for values in streams])
    streams.clear()
    generator = torch.Generator().manual_seed(seed)
    gradients: list[dict[Node, Tensor]] = [{} for _ in windows]
    for piece in reversed(run.pieces[1:]):
        weights = run.weights_of(piece)
        linears = {linear.node: linear for linear in piece.linears if linear.name in wanted}
        seen: dict[Node, list[tuple[Tensor, Tensor]]] = {node: [] for node in linears}
        for values, given in zip(before.pop(), gradients, strict=True):
            last = piece is run.pieces[-1]
            _backward(piece, values, given, weights, linears, seen, run, generator if last else None)
        yield piece.name, _observed(linears, weights, seen)
        tell(piece.name)


def _observed(
    linears: Mapping[Node, Linear],
    weights: Mapping[str, Tensor],
    seen: Mapping[Node, list[tuple[Tensor, Tensor]]],
) -> list[Observed]:
    """The windows of each linear end to end; those that read one value share one tensor of it."""
    inputs: dict[Node, Tensor] = {}
    observed = []
    for node, pairs in seen.items():
        if not pairs:
            continue
        linear = linears[node]
        if linear.input not in inputs:
            inputs[linear.input] = torch.cat([x for x, _ in pairs])
        gradients = torch.cat([g for _, g in pairs])
        observed.append(Observed(linear, weights[linear.weight], inputs[linear.input], gradients))
    return observed


class _Pieces:
    """The pieces of a graph and their float32 tensors."""

    def __init__(self, gm: GraphModule, load: Callable[[str], Tensor], device: torch.device):
        first, blocks, last = cut_blocks(gm)
        self.pieces = [first, *blocks, last]
        self.device = device
        self.output: Node = _logits(gm)
        self._gm = gm
        self._load = load

    def inputs(self, window: Tensor) -> dict[Node, Any]:
        """Values of the graph's placeholders for a window."""
        values: dict[Node, Any] = {}
        length = window.shape[1]
        for node in self._gm.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.target == "input_ids":
                values[node] = window.to(self.device)
            elif node.target == "position_ids":
                values[node] = torch.arange(length, device=self.device)[None]
            else:
                values[node] = torch.zeros(1, length, dtype=torch.int64, device=self.device)
        return values

    def weights_of(self, piece: Block) -> dict[str, Tensor]:
        """The tensors that a piece reads; floats as float32."""
        weights = {}
        for name in piece.parameters:
            module, _, leaf = name.rpartition(".")
            held = getattr(self._gm.get_submodule(module), leaf)
            tensor = resolve(recipe_of(self._gm, name), self._load) if held.is_meta else held
            tensor = tensor.detach().to(self.device)
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        return weights


def _backward(
    piece: Block,
    values: Mapping[Node, Any],
    gradients: dict[Node, Tensor],
    weights: Mapping[str, Tensor],
    linears: Mapping[Node, Linear],
    seen: Mapping[Node, list[tuple[Tensor, Tensor]]],
    run: _Pieces,
    labels: torch.Generator | None,
) -> None:
    """Run a piece of one window with gradients; `gradients` turns from its writes' into its reads'."""
    leaves = {
        node: value.detach().requires_grad_() if _is_float(value) else value for node, value in values.items()
    }
    made: dict[Node, Tensor] = {}
    inputs = {linear.input for linear in linears.values()}

    def keep(node: Node, value: Any) -> None:
        if node in linears or node in inputs:
            made[node] = value

    wanted = [run.output] if labels is not None else [node for node in piece.writes if node in gradients]
    with torch.enable_grad():
        found = run_nodes(
            piece.nodes, leaves, weights.__getitem__, wanted, dtypes=_HALVES, device=run.device, on_value=keep
        )
        if labels is not None:
            outputs = [_log_likelihood(found[run.output], labels)]
            ahead = [torch.ones_like(outputs[0])]
        else:
            outputs = [found[node] for node in wanted]
            ahead = [gradients.pop(node) for node in wanted]
    sources = [node for node, value in leaves.items() if _is_float(value)]
    results = [node for node in linears if node in made]
    grads = torch.autograd.grad(
        outputs,
        [*(leaves[node] for node in sources), *(made[node] for node in results)],
        ahead,
        allow_unused=True,
    )
    for node, grad in zip(sources, grads, strict=False):
        if grad is not None:
            gradients[node] = gradients[node] + grad if node in gradients else grad
    for node, grad in zip(results, grads[len(sources) :], strict=True):
        if grad is not None:
            x = made.get(linears[node].input, leaves.get(linears[node].input))
            if not isinstance(x, Tensor):
                raise InvalidInputError(f"{linears[node].name}: its input could not be observed")
            seen[node].append((x.detach().flatten(0, -2), grad.flatten(0, -2)))


def _log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Σ log p(label), one label per position drawn from the model's own distribution."""
    log_p = torch.log_softmax(logits.flatten(0, -2).float(), dim=-1)
    # Drawn by inverting the distribution function with numbers from the CPU: the same on any device.
    points = torch.rand(log_p.shape[0], 1, generator=generator, dtype=torch.float64).to(log_p.device)
    steps = log_p.detach().double().exp().cumsum(dim=-1)
    labels = torch.searchsorted(steps, points * steps[:, -1:]).clamp_(max=log_p.shape[1] - 1)
    return log_p.gather(1, labels).sum()


def _logits(gm: GraphModule) -> Node:
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    first: Node = output.all_input_nodes[0]
    return first


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
