"""Removes what computes nothing: assertions of the export, mode wrappers, idle casts and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule

from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    dtype_of,
    is_mutated,
    is_tensor,
    rank_of,
    replace,
    same_shape,
    same_size,
    shape_of,
    value,
)

_ASSERTS = (
    aten._assert_tensor_metadata.default, aten._assert_async.default, aten._assert_async.msg,
    aten._assert_scalar.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip


class InlineSubgraphs(Pass):
    """Puts the bodies of `wrap_with_set_grad_enabled` and `wrap_with_autocast` where they are called.

    The graph is for inference, so grad mode has no effect. An autocast region that is enabled
    changes dtypes and is left alone.
    """

    name = "inline_subgraphs"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            position = _body_position(node)
            if position is None:
                continue
            if position and bool(node.args[2]):
                result.skip(node, "autocast is enabled inside and would change dtypes")
                continue
            body_position = 1 if position == 0 else 4
            body_node = node.args[body_position]
            body = gm.get_submodule(str(body_node.target))
            if not isinstance(body, GraphModule):
                result.skip(node, "its body is no graph")
                continue
            _inline(gm, node, body, node.args[body_position + 1 :])
            result.matched += 1


def _body_position(node: Node) -> int | None:
    if calls(node, torch.ops.higher_order.wrap_with_set_grad_enabled):
        return 0
    if calls(node, torch.ops.higher_order.wrap_with_autocast):
        return 1
    return None


def _inline(gm: GraphModule, node: Node, body: GraphModule, inputs: tuple[Any, ...]) -> None:
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            copy = gm.graph.node_copy(inner, mapping.__getitem__)
            if inner.op == "get_attr":
                copy.target = f"{node.args[1].target}.{inner.target}"
            mapping[inner] = copy
    returned: Any = body.graph.output_node().args[0]
    if isinstance(returned, fx.Node):
        node.replace_all_uses_with(mapping[returned])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(mapping[returned[user.args[1]]])
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)


class RemoveAsserts(Pass):
    """Removes the checks that torch.export writes into a graph: assertions on metadata, ranges, guards.

    The artifact's own input checks take their place; here they only hide the ops from the matchers.
    """

    name = "remove_asserts"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in reversed(list(gm.graph.nodes)):
            guard = node.op == "call_module" and str(node.target).endswith("_guards_fn")
            if (guard or calls(node, *_ASSERTS)) and not node.users:
                gm.graph.erase_node(node)
                result.matched += 1


class RemoveNoOps(Pass):
    """Removes dead code and what hands its input on unchanged.

    Casts to the same dtype, copies with the same strides, dropout outside training, slices of
    everything, views and expansions to the same shape, products with 1, concatenations with empty tensors.
    """

    name = "remove_no_ops"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code()
        result.matched += before - len(gm.graph.nodes)
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not is_tensor(node):
                continue
            source = _unchanged(node)
            if source is None:
                result.matched += _drop_empty_parts(node)
                continue
            # A copy separates its reader from later writes; without writes it does nothing.
            if calls(node, *_COPIES) and (is_mutated(node) or is_mutated(source)):
                result.skip(node, "it copies a tensor that is written to in place")
                continue
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)  # dead code elimination keeps random ops such as dropout
            result.matched += 1


_COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.mul.Tensor,
    aten.cat.default,
    aten._to_copy.default,
)


def _unchanged(node: Node) -> Node | None:
    """The input that `node` equals, or None."""
    source = node.args[0] if node.args else None
    if calls(node, aten.cat.default):
        parts = node.args[0]
        return parts[0] if len(parts) == 1 else None
    if not is_tensor(source) or dtype_of(source) != dtype_of(node):
        return None
    if calls(
        node, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default
    ):
        return source
    if calls(node, aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default):
        return source if not argument(node, 2, "train") or argument(node, 1, "p") == 0 else None
    if calls(node, *_CASTS):
        return source if value(node).device == value(source).device and _same_strides(node, source) else None
    if calls(node, aten.clone.default, aten.contiguous.default):
        return source if _same_strides(node, source) else None
    if calls(node, aten.slice.Tensor):
        dim, start, step = (
            argument(node, 1, "dim", 0),
            argument(node, 2, "start"),
            argument(node, 4, "step", 1),
        )
        whole = start in (None, 0) and step == 1 and same_size(shape_of(node)[dim], shape_of(source)[dim])
        return source if whole else None
    if calls(node, *_RESHAPES):
        return source if same_shape(shape_of(node), shape_of(source)) else None
    if calls(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        return source if node.args[1] == 1 else None
    return None


_CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other,
    aten._to_copy.default, aten.type_as.default,
)  # fmt: skip
_RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default)


def _same_strides(a: Node, b: Node) -> bool:
    return same_shape(value(a).stride(), value(b).stride())


def _drop_empty_parts(node: Node) -> int:
    """Take tensors without elements out of a concatenation; returns how many."""
    if not calls(node, aten.cat.default):
        return 0
    dim = argument(node, 1, "dim", 0) % max(rank_of(node), 1)
    parts = list(node.args[0])
    full = [p for p in parts if not (is_tensor(p) and rank_of(p) == rank_of(node) and shape_of(p)[dim] == 0)]
    if len(full) == len(parts) or not full:
        return 0
    if len(full) == 1 and dtype_of(full[0]) == dtype_of(node):
        if is_mutated(node) or is_mutated(full[0]):
            return 0
        replace(node, full[0])
    else:
        node.args = (full, *node.args[1:])
    return len(parts) - len(full)
