"""Computes logits only for the rows that are wanted, by gathering rows as early as that is legal.

Everything behind the last op that looks across tokens works row by row, so the
last layer's output projection, its feed-forward block, the final norm and
lm_head need only the rows whose logits are read (one per sequence, usually).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_inputs import InputBuilder
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    insert_call,
    is_tensor,
    output_node_values,
    rank_of,
    refresh_values,
    same_size,
    shape_of,
    value,
)
from qcompiler.passes.quantize_linears import is_quantized_linear

_ops = torch.ops.qcompiler


class GatherLogitsRows(Pass):
    """Adds the input `logits_rows` int64 [R] and selects these rows; the output becomes [1, R, V]."""

    name = "gather_logits_rows"
    required = True

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        outputs = output_node_values(gm.graph)
        values = [value(node) for node in outputs]
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and is_tensor(n)]
        if any(node.target == "logits_rows" for node in inputs):
            return
        if len(values) != 1 or not inputs or not isinstance(values[0], torch.Tensor):
            result.skip("output", f"the graph has {len(outputs)} outputs, expected the logits alone")
            return
        tokens = shape_of(inputs[0])[1 if rank_of(inputs[0]) > 1 else 0]
        if not _has_rows(outputs[0], tokens):
            result.skip(outputs[0], f"its shape {list(shape_of(outputs[0]))} is not [1, tokens, …]")
            return
        gathered = _row_wise_tail(gm, outputs[0], tokens)
        if not gathered:
            result.skip(outputs[0], "its op is not known to work row by row; rows are gathered behind it")
        _gather(gm, outputs[0], gathered, tokens)
        result.matched += 1


def _gather(gm: GraphModule, output: Node, tail: set[Node], tokens: Any) -> None:
    builder = InputBuilder(gm)
    rows = builder.tensor("logits_rows", (builder.size("logits_rows", 3),), torch.int64)
    graph = gm.graph
    readers: dict[Node, list[Node]] = {}
    if not tail:
        readers[output] = [graph.output_node()]
    for node in graph.nodes:
        if node in tail:
            for source in node.all_input_nodes:
                if source not in tail and _has_rows(source, tokens):
                    readers.setdefault(source, []).append(node)
    selected = []
    for source, users in readers.items():
        with graph.inserting_before(min(users)):
            narrow = insert_call(graph, aten.index_select.default, (source, 1, rows), like=source)
        for user in users:
            user.replace_input_with(source, narrow)
        selected.append(narrow)
    refresh_values(graph, selected)


def _has_rows(node: Node, tokens: Any) -> bool:
    return is_tensor(node) and rank_of(node) == 3 and _is_rows(shape_of(node), tokens)


def _is_rows(shape: Any, tokens: Any) -> bool:
    return same_size(shape[0], 1) and same_size(shape[1], tokens)


def _row_wise_tail(gm: GraphModule, output: Node, tokens: Any) -> set[Node]:
    """Nodes that only the output needs and that work row by row, as far up as a linear or norm is saved."""
    tail: set[Node] = set()
    for node in reversed(list(gm.graph.nodes)):
        needed = all(user in tail or user.op == "output" for user in node.users) and node.users
        if needed and _row_wise(node, tokens) and (node is output or any(u in tail for u in node.users)):
            tail.add(node)
    worth: set[Node] = set()
    for node in gm.graph.nodes:
        if node in tail and (_is_heavy(node) or any(source in worth for source in node.all_input_nodes)):
            worth.add(node)
    return worth


def _row_wise(node: Node, tokens: Any) -> bool:
    """True if row i of every result of `node` depends on row i of its inputs alone."""
    if node.op != "call_function":
        return False
    allowed = _always if is_quantized_linear(node) else _ROW_WISE.get(node.target)
    if allowed is None or not allowed(node):
        return False
    results = value(node)
    if not all(t.dim() == 3 and _is_rows(t.shape, tokens) for t in _as_tuple(results)):
        return False
    for source in node.all_input_nodes:
        if not all(isinstance(t, torch.Tensor) for t in _as_tuple(value(source))):
            return False
        for tensor in _as_tuple(value(source)):
            rows = tensor.dim() == 3 and _is_rows(tensor.shape, tokens)
            if not rows and any(not isinstance(size, int) for size in tensor.shape):
                return False
    return True


def _as_tuple(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, (list, tuple)) else (item,)


def _always(_: Node) -> bool:
    return True


def _on_last(position: int, name: str, default: int) -> Callable[[Node], bool]:
    """A check that an op's dimension argument is the last one."""

    def check(node: Node) -> bool:
        dims = argument(node, position, name, default)
        rank = rank_of(node.args[0]) if is_tensor(node.args[0]) else rank_of(node.args[0][0])
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        return [d % rank for d in dims] == [rank - 1]

    return check


def _kept_last(node: Node) -> bool:
    return _on_last(1, "dim", -1)(node) and bool(argument(node, 2, "keepdim", False))


_ROW_WISE: dict[Any, Callable[[Node], bool]] = {
    **dict.fromkeys(
        (
            aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
            aten.pow.Tensor_Scalar, aten.square.default, aten.rsqrt.default, aten.sqrt.default,
            aten.tanh.default, aten.sigmoid.default, aten.relu.default, aten.silu.default,
            aten.gelu.default, aten.clamp.default, aten.to.dtype, aten._to_copy.default,
            aten.alias.default, aten.clone.default, aten.contiguous.default, aten.linear.default,
            _ops.rms_norm.default, _ops.add_rms_norm.default,
            _ops.layer_norm.default, _ops.silu_mul.default, _ops.gelu_mul.default, operator.getitem,
        ),
        _always,
    ),
    aten.slice.Tensor: _on_last(1, "dim", 0),
    aten.chunk.default: _on_last(2, "dim", 0),
    aten.split.Tensor: _on_last(2, "dim", 0),
    aten.split_with_sizes.default: _on_last(2, "dim", 0),
    aten.cat.default: _on_last(1, "dim", 0),
    aten.mean.dim: _kept_last,
    aten.softmax.int: _on_last(1, "dim", -1),
    aten.layer_norm.default: lambda node: len(node.args[1]) == 1,
}  # fmt: skip

_HEAVY = (
    aten.linear.default, _ops.rms_norm.default, _ops.add_rms_norm.default,
    _ops.layer_norm.default, aten.layer_norm.default, aten.rsqrt.default,
)  # fmt: skip


def _is_heavy(node: Node) -> bool:
    return is_quantized_linear(node) or calls(node, *_HEAVY)
