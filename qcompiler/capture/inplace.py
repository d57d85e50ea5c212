"""Rewrites in-place ops as functions of their inputs, where no other view of the tensor is read afterwards.

`x.div_(y)` becomes `x' = div(x, y)` with x' in the place of x from there on.
Writing into slices of a fresh tensor becomes `slice_scatter`, and slices that
tile the whole of it become one `cat`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompiler.kernels.errors import UnsupportedModelError

aten = torch.ops.aten

_EMPTY = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
_FUNCTIONS = {aten.zero_.default: aten.zeros_like.default, aten.fill_.Scalar: aten.full_like.default}


def functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op without the mutation: `aten.div.Tensor` for `aten.div_.Tensor`; None if there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def mutates(node: fx.Node) -> bool:
    """Whether a node writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def view_source(node: fx.Node) -> fx.Node | None:
    """The node that this one may share memory with, if any."""
    if node.op != "call_function":
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        # an item of split or unbind shares memory with what was split; an item of topk does not
        whole = node.args[0]
        return whole if isinstance(whole, fx.Node) and view_source(whole) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    if not any(r.alias_info is not None for r in schema.returns):
        return None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def check_no_other_view(node: fx.Node) -> None:
    """Refuse a mutation whose effect a later node sees through another view of the same memory.

    Raises:
        UnsupportedModelError: Names the op.
    """
    written = node.args[0]
    root: Any = written
    while (source := view_source(root)) is not None:
        root = source
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if isinstance(root, fx.Node) and root.op != "call_function":
        raise UnsupportedModelError(f"{node.target} writes to {root.name}, a weight or an input of the model")
    family = {root}
    for other in node.graph.nodes:
        if view_source(other) in family and order[other] < order[node]:
            family.add(other)
    for other in family - {written}:
        if any(order[user] > order[node] for user in other.users):
            raise UnsupportedModelError(
                f"{node.target} changes a tensor that is read through another view afterwards"
            )


def written_slice(node: fx.Node) -> fx.Node | None:
    """The slice node of `base[..., a:b] = value`, if that is what the node is."""
    written = node.args[0]
    if (
        node.target is aten.copy_.default
        and isinstance(written, fx.Node)
        and written.target is aten.slice.Tensor
    ):
        return written
    return None


def fuse_slice_writes(graph: fx.Graph) -> None:
    """`slice_scatter` calls that together fill an empty tensor become one `cat`."""
    for node in reversed(list(graph.nodes)):
        if node.target is not aten.slice_scatter.default:
            continue
        chain, current = [], node
        while current.target is aten.slice_scatter.default and (current is node or len(current.users) == 1):
            chain.append(current)
            current = current.args[0]
        if current.target not in _EMPTY:
            continue
        dims = {link.args[2] % link.meta["val"].ndim for link in chain}
        pieces = sorted((link.args[3] or 0, link.meta["stop"], link.args[1]) for link in chain)
        dim = dims.pop()
        bounds = [0, *(stop for _, stop, _ in pieces)]
        tiled = all(begin == bound for (begin, _, _), bound in zip(pieces, bounds, strict=False))
        if dims or not tiled or bounds[-1] != node.meta["val"].shape[dim]:
            continue
        with graph.inserting_before(node):
            joined = graph.call_function(aten.cat.default, ([value for *_, value in pieces], dim))
        joined.meta = {key: value for key, value in node.meta.items() if key != "stop"}
        node.replace_all_uses_with(joined)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.target is aten.slice_scatter.default or node.target in _EMPTY):
            graph.erase_node(node)
