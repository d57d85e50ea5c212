"""LayerNorm → `qcompiler::layer_norm`: torch's own op, and the decomposed form of Cohere's models.

y = (x − mean) / √(var + ε) · weight + bias over the last dimension, in fp32, rounded last.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import Node, argument, aten, calls, dtype_of, insert_call, rank_of, replace
from qcompiler.passes.norm_patterns import (
    InverseRoot,
    Tail,
    find_inverse_roots,
    mean_of,
    norm_input,
    normalises_last_dim,
    read_tail,
    squared,
    without_widening,
)


class FuseLayerNorm(Pass):
    """`aten.layer_norm`, `aten.native_layer_norm` and decomposed layer norms → `qcompiler::layer_norm`."""

    name = "fuse_layer_norm"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if calls(node, aten.layer_norm.default, aten.native_layer_norm.default):
                _from_torch(node, result)
        for root in find_inverse_roots(list(gm.graph.nodes)):
            x = _variance_of(root.variance)
            if x is None:
                continue
            reason = _rewrite(gm, root, x)
            if reason is None:
                result.matched += 1
            else:
                result.skip(root.node, reason)


def _variance_of(node: Node) -> Node | None:
    """x, if `node` is the biased variance of x over the last dimension."""
    if calls(node, aten.var.correction):
        x, dims = node.args[0], argument(node, 1, "dim")
        last = dims is not None and [d % rank_of(x) for d in dims] == [rank_of(x) - 1]
        return (
            x
            if last and argument(node, 2, "correction") == 0 and argument(node, 3, "keepdim", False)
            else None
        )
    averaged = mean_of(node)
    if averaged is None or averaged[1] is not None:
        return None
    centred = squared(averaged[0])
    return None if centred is None else _centred(centred)


def _centred(node: Node) -> Node | None:
    """x, if `node` is x − mean(x) over the last dimension."""
    if not calls(node, aten.sub.Tensor) or argument(node, 2, "alpha", 1) != 1:
        return None
    x, mean = node.args[0], node.args[1]
    averaged = mean_of(mean) if isinstance(mean, fx.Node) else None
    if (
        averaged is None
        or averaged[1] is not None
        or without_widening(averaged[0]) is not without_widening(x)
    ):
        return None
    return x


def _rewrite(gm: GraphModule, root: InverseRoot, x: Node) -> str | None:
    if root.scaled is None or root.factor is None:
        return "the inverse root does not scale one tensor only"
    scaled = _centred(root.factor)
    if scaled is None or without_widening(scaled) is not without_widening(x):
        return "the variance is that of another tensor than the one scaled"
    if dtype_of(root.node).itemsize < 4:
        return f"the variance is taken in {dtype_of(root.node)}, the op computes it in fp32"
    tail = read_tail(root.scaled, allow_bias=True)
    if tail.offset or (tail.cast_first and tail.weight is not None):
        # The op applies its weight in fp32; leave the weight to the ops that stand there.
        end = next(iter(root.scaled.users)) if tail.cast_first else root.scaled
        tail = Tail(end, None, 0.0, None, False)
    source = norm_input(x, dtype_of(tail.end))
    if source is None:
        return f"input is {dtype_of(without_widening(x))} but the result stays in {dtype_of(tail.end)}"
    with gm.graph.inserting_before(tail.end):
        fused = insert_call(
            gm.graph,
            torch.ops.qcompiler.layer_norm.default,
            (source, tail.weight, tail.bias, root.eps),
            like=root.scaled,
        )
    replace(tail.end, fused)
    return None


def _from_torch(node: Node, result: PassResult) -> None:
    x, shape = node.args[0], node.args[1]
    weight, bias, eps = (argument(node, i, name) for i, name in _LAYER_NORM_ARGS)
    if not normalises_last_dim(x, shape):
        result.skip(node, f"it normalises over {list(shape)}, not the last dimension")
        return
    end = node
    if node.target is aten.native_layer_norm.default:
        firsts = [u for u in node.users if calls(u, operator.getitem) and u.args[1] == 0]
        if len(firsts) != len(node.users) or not firsts:
            result.skip(node, "its mean or inverse deviation is read too")
            return
        end = firsts[0]
        for extra in firsts[1:]:
            extra.replace_all_uses_with(end)
    with node.graph.inserting_before(node):
        fused = insert_call(
            node.graph,
            torch.ops.qcompiler.layer_norm.default,
            (x, weight, bias, 1e-5 if eps is None else float(eps)),
            like=node,
        )
    replace(end, fused)
    result.matched += 1


_LAYER_NORM_ARGS = ((2, "weight"), (3, "bias"), (4, "eps"))
