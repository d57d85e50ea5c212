"""Residual addition followed by RMSNorm → `qcompiler::add_rms_norm`, which reads the sum once."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    dtype_of,
    insert_call,
    is_tensor,
    precedes,
    replace,
    same_shape,
    shape_of,
)


class FuseAddNorm(Pass):
    """`s = x + r; y = rms_norm(s)` → `y, s = add_rms_norm(x, r)`. The sum keeps its rounding."""

    name = "fuse_add_norm"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if not calls(node, torch.ops.qcompiler.rms_norm.default):
                continue
            total = node.args[0]
            if not calls(total, aten.add.Tensor):
                continue
            reason = _rewrite(gm, node, total)
            if reason is None:
                result.matched += 1
                result.launches_saved += 1
            else:
                result.skip(node, reason)


def _rewrite(gm: GraphModule, norm: Node, total: Node) -> str | None:
    a, b = total.args[:2]
    if argument(total, 2, "alpha", 1) != 1:
        return "the addition scales its second term"
    if not (is_tensor(a) and is_tensor(b) and same_shape(shape_of(a), shape_of(b))):
        return "the terms of the addition have different shapes"
    if not dtype_of(a) == dtype_of(b) == dtype_of(total):
        return "the terms of the addition have different dtypes"
    _, weight, eps, offset, cast_first = norm.args
    first = min(total.users)  # the norm, unless someone reads the sum before it
    if first is not norm and isinstance(weight, fx.Node) and precedes(first, weight):
        if weight.op != "get_attr":
            return "the sum is read before the norm's weight is computed"
        first.prepend(weight)
    with gm.graph.inserting_before(first):
        # The branch's output comes second in `residual + branch`; the sum is the same either way.
        pair = insert_call(
            gm.graph,
            torch.ops.qcompiler.add_rms_norm.default,
            (b, a, weight, eps, offset, cast_first),
            like=norm,
        )
        normed = insert_call(gm.graph, operator.getitem, (pair, 0), like=norm)
        kept = insert_call(gm.graph, operator.getitem, (pair, 1), like=total)
    replace(norm, normed)
    total.replace_all_uses_with(kept)
    return None
