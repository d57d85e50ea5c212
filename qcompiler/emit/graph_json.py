"""A lowered FX graph as graph.json: plain data that `runtime.graph` checks and `runtime.program` runs.

The schema is described in `qcompiler/runtime/graph.py`. Symbolic sizes become
plain names ("T" tokens, "S" sequences, "P" pages per sequence, "R" rows of
logits); an expression of them gets a name of its own and is never written out,
since the reader evaluates nothing.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from qcompiler.kernels.errors import UnsupportedModelError
from qcompiler.runtime.graph import DTYPE_BY_NAME, SCHEMA
from qcompiler.runtime.opset import is_allowed

_SCALAR_FUNCTIONS: dict[Any, str] = {
    operator.getitem: "sym.getitem",
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.truediv: "sym.truediv",
    operator.mod: "sym.mod",
    operator.neg: "sym.neg",
    operator.abs: "sym.abs",
    operator.eq: "sym.eq",
    operator.ne: "sym.ne",
    operator.lt: "sym.lt",
    operator.le: "sym.le",
    operator.gt: "sym.gt",
    operator.ge: "sym.ge",
    operator.not_: "sym.not",
    min: "sym.min",
    max: "sym.max",
    torch.sym_min: "sym.min",
    torch.sym_max: "sym.max",
    torch.sym_not: "sym.not",
    torch.sym_int: "sym.int",
    torch.sym_float: "sym.float",
    torch.ops.aten.sym_size.int: "sym.size",
}
_MEMORY_FORMATS = {
    torch.contiguous_format: "contiguous_format",
    torch.preserve_format: "preserve_format",
    torch.channels_last: "channels_last",
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
_SIZE_NAMES = {
    ("input_ids", 1): "T",
    ("logits_rows", 0): "R",
    ("block_table", 0): "S",
    ("seq_lens", 0): "S",
    ("query_start", 0): "S1",
    ("block_table", 1): "P",
    ("k_pages_0", 0): "N",
    ("k_pages_0", 1): "B",
}


def graph_to_json(gm: fx.GraphModule, *, kind: str) -> dict[str, Any]:
    """Encode a lowered graph.

    Args:
        gm: Placeholders, `get_attr`, `call_function` and `output` nodes only; nodes carry `meta["val"]`.
        kind: "decoder" or "encoder".

    Returns:
        The JSON object; equal graphs give equal objects.

    Raises:
        UnsupportedModelError: a node calls something that the runtime does not run; names node and op.
    """
    encoder = _Encoder()
    live = _live_nodes(gm.graph)
    inputs: list[dict[str, Any]] = []
    weights: list[str] = []
    nodes: list[dict[str, Any]] = []
    outputs: list[Any] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            inputs.append(encoder.placeholder(node))
        elif node not in live:
            continue
        elif node.op == "get_attr":
            if node.target not in weights:
                weights.append(str(node.target))
        elif node.op == "call_function":
            nodes.append(encoder.call(node))
        elif node.op == "output":
            outputs = [encoder.value(v, node) for v in _flat_outputs(node.args[0])]
        else:
            raise UnsupportedModelError(f"graph node {node.name!r}: {node.op} has no place in an artifact")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "inputs": inputs,
        "weights": sorted(weights),
        "nodes": nodes,
        "outputs": outputs,
    }


def graph_weights(gm: fx.GraphModule) -> list[str]:
    """Names of the tensors that a lowered graph needs, sorted."""
    live = _live_nodes(gm.graph)
    return sorted({str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and n in live})


def _flat_outputs(value: Any) -> list[fx.Node]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs need, and those that write in place."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        target = node.target
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        if node.op == "output" or node in live or writes:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


class _Encoder:
    def __init__(self) -> None:
        self._sizes: dict[str, str] = {}

    def placeholder(self, node: fx.Node) -> dict[str, Any]:
        value = node.meta.get("val")
        name = str(node.target)
        if isinstance(value, torch.Tensor):
            shape = [self.size(s, _SIZE_NAMES.get((name, i))) for i, s in enumerate(value.shape)]
            return {"name": name, "dtype": _DTYPE_NAMES[value.dtype], "shape": shape}
        return {"name": name, "dtype": "int", "shape": []}

    def call(self, node: fx.Node) -> dict[str, Any]:
        encoded: dict[str, Any] = {
            "name": node.name,
            "op": self.op(node),
            "args": [self.value(a, node) for a in node.args],
        }
        if node.kwargs:
            encoded["kwargs"] = {k: self.value(v, node) for k, v in sorted(node.kwargs.items())}
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _DTYPE_NAMES:
            encoded["dtype"] = _DTYPE_NAMES[value.dtype]
            encoded["shape"] = [self.size(s) for s in value.shape]
        elif isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            encoded["dtype"] = "int"
        return encoded

    def op(self, node: fx.Node) -> str:
        target = node.target
        name = _SCALAR_FUNCTIONS.get(target)
        if name is None and isinstance(target, torch._ops.OpOverload):
            name = str(target)
        if name is None or not is_allowed(name):
            raise UnsupportedModelError(
                f"graph node {node.name!r} calls {name or target}, which the runtime does not run",
                hint="The op is missing from qcompiler.runtime.opset, or a pass should have replaced it.",
            )
        return name

    def value(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return {"weight": str(value.target)}
            return {"ref": str(value.target) if value.op == "placeholder" else value.name}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            if math.isfinite(value):
                return value
            return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
        if isinstance(value, (list, tuple)):
            return [self.value(v, node) for v in value]
        if isinstance(value, torch.dtype) and value in _DTYPE_NAMES:
            return {"dtype": _DTYPE_NAMES[value]}
        if isinstance(value, torch.device):
            return {"device": "model"}
        if isinstance(value, torch.memory_format) and value in _MEMORY_FORMATS:
            return {"memory_format": _MEMORY_FORMATS[value]}
        if value is torch.strided:
            return {"layout": "strided"}
        raise UnsupportedModelError(
            f"graph node {node.name!r} ({node.target}): argument {value!r} cannot be written as data"
        )

    def size(self, size: Any, preferred: str | None = None) -> int | str:
        if isinstance(size, int):
            return size
        expression = str(size)
        name = self._sizes.get(expression)
        if name is None:
            taken = set(self._sizes.values())
            name = preferred if preferred and preferred not in taken else f"d{len(self._sizes)}"
            self._sizes[expression] = name
        return name
