"""Cuts a captured graph at its decoder (or encoder) blocks and runs the pieces.

A block is one entry of the module list whose entries hold the attentions:
`model.layers.3`, `transformer.h.3`. Which list that is follows from the nodes'
`nn_module_stack`, so no architecture is known here. Pieces are contiguous in
graph order: what stands between the first node of a block and the first of the
next belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from qcompiler.kernels.errors import UnsupportedModelError
from qcompiler.kernels.library import registered_ops
from qcompiler.passes.weights import layer_name

aten = torch.ops.aten
FetchWeight = Callable[[str], torch.Tensor]

_ENTRY = re.compile(r"^(?P<list>.*?)\.?(?P<index>\d+)(?=\.|$)")


@dataclass(frozen=True)
class Linear:
    """A linear of a block whose weight is a parameter.

    Attributes:
        name: The layer, e.g. `model.layers.0.mlp.up_proj`.
        weight: Name of its weight in the graph.
        node: The call.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
    """

    name: str
    weight: str
    node: Node
    out_features: int
    in_features: int

    @property
    def input(self) -> Node:
        """The node that gives its input [1, T, in_features]."""
        source = self.node.args[0]
        if not isinstance(source, Node):
            raise UnsupportedModelError(f"{self.name} has a constant input")
        return source


@dataclass(frozen=True)
class Block:
    """A contiguous piece of the graph.

    Attributes:
        name: Module path, e.g. `model.layers.0`.
        nodes: Calls in order.
        reads: Values that it takes from earlier pieces or graph inputs.
        writes: Values that later pieces or the graph's output take from it.
        linears: Its linears in order.
        parameters: Names of all the tensors that it reads from the module.
    """

    name: str
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    linears: tuple[Linear, ...]
    parameters: tuple[str, ...]

    def stages(self) -> list[list[Linear]]:
        """Linears that read the same value, in graph order: their inputs are known at the same moment."""
        by_input: dict[Node, list[Linear]] = {}
        for linear in self.linears:
            by_input.setdefault(linear.input, []).append(linear)
        return list(by_input.values())

    def until(self, value: Node) -> list[Node]:
        """The nodes of this block that `value` is computed from, itself included, in order."""
        wanted = {value}
        for node in reversed(self.nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        return [node for node in self.nodes if node in wanted]


def cut_blocks(gm: GraphModule) -> tuple[Block, list[Block], Block]:
    """What stands before the blocks, the blocks, and what stands behind them.

    Raises:
        UnsupportedModelError: The attentions do not lie in the entries of one module list.
    """
    nodes = list(gm.graph.nodes)
    path = _block_list(nodes)
    starts: dict[str, int] = {}
    last = 0
    for position, node in enumerate(nodes):
        entry = _entry_of(node, path)
        if entry is not None and node.op != "get_attr":
            starts.setdefault(entry, position)
            last = position
    names = sorted(starts, key=starts.__getitem__)
    bounds = [0, *(starts[name] for name in names), last + 1, len(nodes)]
    pieces = [
        _piece(name, nodes[begin:end])
        for name, begin, end in zip(["input", *names, "output"], bounds, bounds[1:], strict=False)
    ]
    return pieces[0], pieces[1:-1], pieces[-1]


def run_nodes(
    nodes: Iterable[Node],
    given: Mapping[Node, Any],
    fetch: FetchWeight,
    wanted: Iterable[Node],
    *,
    dtypes: Mapping[torch.dtype, torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    on_value: Callable[[Node, Any], None] | None = None,
) -> dict[Node, Any]:
    """Run nodes in order; differentiable, and values are let go after their last use.

    Args:
        nodes: Calls in order.
        given: Values from outside; not changed.
        fetch: Tensor by attribute name.
        wanted: Nodes whose values to return (given ones too).
        dtypes: Replacements of dtypes that are burnt into the graph.
        device: Replaces the devices that are burnt into the graph.
        on_value: Called with each value that the nodes give.
    """
    nodes = list(nodes)
    wanted = list(wanted)
    keep = set(wanted)
    here = set(nodes)
    dtypes = dtypes or {}
    device = torch.device(device)
    env: dict[Node, Any] = {}
    last_use: dict[Node, int] = {}
    for position, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last_use[source] = position

    def value(argument: Any) -> Any:
        if isinstance(argument, Node):
            if argument.op == "get_attr":
                return fetch(str(argument.target))
            return env[argument] if argument in here else given[argument]
        if isinstance(argument, torch.dtype):
            return dtypes.get(argument, argument)
        return device if isinstance(argument, torch.device) else argument

    for position, node in enumerate(nodes):
        if node.op == "call_function":
            args, kwargs = map_aggregate((node.args, node.kwargs), value)
            env[node] = _differentiable(node.target)(*args, **kwargs)
            if on_value is not None:
                on_value(node, env[node])
        for source in node.all_input_nodes:
            if last_use[source] == position and source not in keep:
                env.pop(source, None)
    return {node: value(node) for node in wanted}


def _differentiable(target: Any) -> Callable[..., Any]:
    """Our ops have no autograd formula; their references are plain torch."""
    if getattr(target, "namespace", "") == "qcompiler":
        return registered_ops()[target._schema.name.split("::")[1]].reference
    return target


def _block_list(nodes: list[Node]) -> str:
    """Path of the module list whose entries hold the attentions."""
    found: dict[str, int] = {}
    for node in nodes:
        if str(node.target) != "qcompiler.attention.default":
            continue
        for path in _module_paths(node):
            entry = _ENTRY.match(path)
            if entry is not None:
                found[entry["list"]] = found.get(entry["list"], 0) + 1
                break
    if len(found) != 1:
        told = ", ".join(sorted(found)) or "none"
        raise UnsupportedModelError(
            f"the graph cannot be cut into blocks: its attentions lie in {len(found)} module lists ({told})",
            hint="Calibrated methods need one list of blocks; rtn and hqq quantize layer by layer.",
        )
    return next(iter(found))


def _module_paths(node: Node) -> list[str]:
    """Module paths around a node, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _entry_of(node: Node, path: str) -> str | None:
    for module in _module_paths(node):
        entry = _ENTRY.match(module)
        if entry is not None and entry["list"] == path:
            return module[: entry.end()]
    return None


def _piece(name: str, nodes: list[Node]) -> Block:
    calls = [node for node in nodes if node.op == "call_function"]
    here = set(calls)
    reads: dict[Node, None] = {}
    parameters: dict[str, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                parameters[str(source.target)] = None
            elif source not in here:
                reads[source] = None
    writes = tuple(node for node in calls if any(user not in here for user in node.users))
    return Block(name, tuple(calls), tuple(reads), writes, tuple(_linears(calls)), tuple(parameters))


def _linears(calls: list[Node]) -> list[Linear]:
    seen: set[str] = set()
    linears = []
    for node in calls:
        if node.target is not aten.linear.default:
            continue
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr" or str(weight.target) in seen:
            continue
        fqn = str(weight.target)
        seen.add(fqn)
        out_features, in_features = (int(size) for size in weight.meta["val"].shape)
        linears.append(Linear(layer_name(fqn), fqn, node, out_features, in_features))
    return linears
