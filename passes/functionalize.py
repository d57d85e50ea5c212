"""In-place ops → their functional twins where nobody could tell; buffers filled in parts → concatenation.

A graph without writes can be reordered, merged and matched freely. Writes whose
effect others may see (through views, inputs or weights, like those to a KV
cache) stay, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    aliased_inputs,
    argument,
    aten,
    calls,
    dtype_of,
    insert_call,
    is_tensor,
    precedes,
    rank_of,
    replace,
    same_shape,
    shape_of,
)


class Functionalize(Pass):
    """`x.op_(…)` → `op(x, …)` for fresh tensors; `empty` filled by `copy_` into its slices → `cat`."""

    name = "functionalize"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if calls(node, *_EMPTY):
                result.matched += _concatenate(gm, node)
        for node in list(gm.graph.nodes):
            twin = _functional_twin(node)
            if twin is None:
                continue
            reason = _rewrite(gm, node, twin)
            if reason is None:
                result.matched += 1
            else:
                result.skip(node, reason)


_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def _functional_twin(node: Node) -> Any:
    """The op that computes what the in-place call `node` leaves behind, or None if it is not in-place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    if not node.target._schema.is_mutable or not name.startswith("aten::") or not name.endswith("_"):
        return None
    packet = getattr(aten, name.removeprefix("aten::")[:-1], None)
    return getattr(packet, node.target._overloadname, None)


def _rewrite(gm: GraphModule, node: Node, twin: Any) -> str | None:
    base = node.args[0]
    if base.op != "call_function":
        return "it writes to an input or a weight"
    if aliased_inputs(base):
        return "it writes through a view"
    for user in base.users:
        if user is not node and base in aliased_inputs(user):
            return "a view of the tensor would see the write"
        if precedes(node, user):
            return "the tensor is read again after the write"
    with gm.graph.inserting_before(node):
        made = insert_call(gm.graph, twin, node.args, node.kwargs, like=node)
    if dtype_of(made) != dtype_of(base) or not same_shape(shape_of(made), shape_of(base)):
        gm.graph.erase_node(made)
        return f"out of place it would give {dtype_of(base)} another dtype or shape"
    replace(node, made)
    gm.graph.erase_node(node)
    return None


def _concatenate(gm: GraphModule, base: Node) -> bool:
    """Replace a buffer that slices fill completely, before anyone reads it, by one `cat`."""
    filled: list[tuple[int, int, Node, Node]] = []
    dims = set()
    for view in base.users:
        writes = [user for user in view.users if calls(user, aten.copy_.default) and user.args[0] is view]
        if not calls(view, aten.slice.Tensor) or not writes:
            continue
        if len(writes) != 1 or len(view.users) != 1 or writes[0].users or argument(view, 4, "step", 1) != 1:
            return False
        dim = argument(view, 1, "dim", 0) % rank_of(base)
        size = shape_of(base)[dim]
        start, end = argument(view, 2, "start") or 0, argument(view, 3, "end")
        end = size if end is None else end
        if not all(isinstance(item, int) for item in (size, start, end)):
            return False
        dims.add(dim)
        filled.append((start, min(end, size), view, writes[0]))
    filled.sort(key=lambda part: part[:2])
    bounds = [0, *(end for _, end, *_ in filled)]
    if len(dims) != 1 or [start for start, *_ in filled] != bounds[:-1]:
        return False
    (dim,) = dims
    last = max(write for *_, write in filled)
    readers = [user for user in base.users if all(user is not view for _, _, view, _ in filled)]
    if bounds[-1] != shape_of(base)[dim] or any(precedes(user, last) for user in readers):
        return False
    parts = [write.args[1] for *_, write in filled]
    if not all(is_tensor(part) and dtype_of(part) == dtype_of(base) for part in parts):
        return False
    if not all(
        same_shape(shape_of(part), shape_of(view))
        for part, (_, _, view, _) in zip(parts, filled, strict=True)
    ):
        return False
    with gm.graph.inserting_after(last):
        joined = insert_call(gm.graph, aten.cat.default, (parts, dim), like=base)
    for reader in readers:
        reader.replace_input_with(base, joined)
    for *_, view, write in filled:
        gm.graph.erase_node(write)
        gm.graph.erase_node(view)
    return True
