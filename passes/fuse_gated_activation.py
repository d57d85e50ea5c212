"""silu(gate) · up and gelu(gate) · up → one op; gate and up may be two linears or the halves of one."""

from __future__ import annotations

from typing import Any

import torch
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
    other,
    replace,
    same_shape,
    shape_of,
)


class FuseGatedActivation(Pass):
    """`mul(silu(gate), up)` → `qcompiler::silu_mul`; `mul(gelu(gate), up)` → `qcompiler::gelu_mul`."""

    name = "fuse_gated_activation"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if not calls(node, aten.silu.default, aten.gelu.default):
                continue
            products = [user for user in node.users if calls(user, aten.mul.Tensor)]
            if not products:
                continue
            reason = _rewrite(gm, node, products[0])
            if reason is None:
                result.matched += 1
                result.launches_saved += 1
            else:
                result.skip(node, reason)


def _rewrite(gm: GraphModule, activation: Node, product: Node) -> str | None:
    gate, up = activation.args[0], other(product.args, activation)
    if len(activation.users) > 1:
        return "the activation is read elsewhere too"
    if not is_tensor(up) or not same_shape(shape_of(gate), shape_of(up)):
        return "gate and up have different shapes"
    if not dtype_of(gate) == dtype_of(up) == dtype_of(product):
        return f"gate is {dtype_of(gate)} and up is {dtype_of(up)}"
    args: tuple[Any, ...] = (gate, up)
    with gm.graph.inserting_before(product):
        op = torch.ops.qcompiler.silu_mul.default
        if calls(activation, aten.gelu.default):
            op = torch.ops.qcompiler.gelu_mul.default
            args = (gate, up, argument(activation, 1, "approximate", "none"))
        fused = insert_call(gm.graph, op, args, like=product)
    replace(product, fused)
    return None
