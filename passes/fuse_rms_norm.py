"""RMSNorm in all the ways models write it → `qcompiler::rms_norm`.

n(x) = x / √(mean(x²) + ε), y = n(x) · (offset + weight). The graph decides
whether n(x) is rounded before the product with the weight (Llama) or after it
(Gemma with offset 1, OLMo 2, gpt-oss), whether there is a weight at all, and
over which dimension's channels (hidden or head) it runs.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import Node, argument, aten, calls, dtype_of, insert_call, replace, value
from qcompiler.passes.norm_patterns import (
    InverseRoot,
    find_inverse_roots,
    mean_of,
    norm_input,
    normalises_last_dim,
    read_tail,
    squared,
    without_widening,
)


class FuseRMSNorm(Pass):
    """Decomposed and `aten.rms_norm` → `qcompiler::rms_norm`.

    `pow(v, -0.5)` and `1/sqrt(v)` become the op's rsqrt, one unit in the last place of fp32 apart.
    """

    name = "fuse_rms_norm"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if calls(node, aten.rms_norm.default):
                _from_torch(node, result)
        for root in find_inverse_roots(list(gm.graph.nodes)):
            averaged = mean_of(root.variance)
            x = None if averaged is None else squared(averaged[0])
            if averaged is None or x is None:
                continue
            reason = averaged[1] or _rewrite(gm, root, x)
            if reason is None:
                result.matched += 1
            else:
                result.skip(root.node, reason)


def _rewrite(gm: GraphModule, root: InverseRoot, x: Node) -> str | None:
    """Fuse one norm; returns the reason if it cannot be."""
    if root.scaled is None or root.factor is None:
        return "the inverse root does not scale one tensor only"
    if without_widening(root.factor) is not without_widening(x):
        return "the mean square is that of another tensor than the one scaled"
    if dtype_of(root.node).itemsize < 4:
        return f"the mean square is taken in {dtype_of(root.node)}, the op computes it in fp32"
    tail = read_tail(root.scaled, allow_bias=False)
    end = tail.end
    source = norm_input(x, dtype_of(end))
    if source is None:
        return f"input is {dtype_of(without_widening(x))} but the result stays in {dtype_of(end)}"
    with gm.graph.inserting_before(end):
        fused = insert_call(
            gm.graph,
            torch.ops.qcompiler.rms_norm.default,
            (
                source,
                tail.weight,
                root.eps,
                tail.offset,
                tail.cast_first or dtype_of(end) == dtype_of(root.scaled),
            ),
            like=root.scaled,
        )
    replace(end, fused)
    return None


def _from_torch(node: Node, result: PassResult) -> None:
    """`F.rms_norm`: everything in fp32, rounded last; without eps it takes that of fp32."""
    x, shape = node.args[0], node.args[1]
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    if not normalises_last_dim(x, shape):
        result.skip(node, f"it normalises over {list(shape)}, not the last dimension")
        return
    if eps is None:
        wide = torch.float64 if value(x).dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps
    with node.graph.inserting_before(node):
        fused = insert_call(
            node.graph, torch.ops.qcompiler.rms_norm.default, (x, weight, float(eps), 0.0, False), like=node
        )
    replace(node, fused)
    result.matched += 1
