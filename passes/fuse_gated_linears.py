"""Gate and up projection side by side, and their gated activation → one linear with the activation inside.

For weights in the affine format, whose kernel computes a channel of gate and
its channel of up in one program: the two products never go to memory.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    call_arguments,
    calls,
    dtype_of,
    insert_call,
    last_dim_span,
    replace,
)
from qcompiler.passes.quantize_linears import linear_like

_ops = torch.ops.qcompiler


class FuseGatedLinears(Pass):
    """`silu_mul` or `gelu_mul` of the halves of one `linear_affine` → `linear_affine_gated`."""

    name = "fuse_gated_linears"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if not calls(node, _ops.silu_mul.default, _ops.gelu_mul.default):
                continue
            gate, up = (last_dim_span(half) for half in node.args[:2])
            if gate is None or up is None or gate.source is not up.source or not linear_like(gate.source):
                result.skip(node, "gate and up are not parts of one linear")
                continue
            linear, size = gate.source, gate.size
            if (gate.start, gate.end, up.start, up.end) != (0, size // 2, size // 2, size):
                result.skip(node, "gate and up are not the first and the second half of their linear")
            elif not calls(linear, _ops.linear_affine.default):
                result.skip(node, "the format of its weight has no op with an activation inside")
            elif not _reads_alone(node, linear):
                result.skip(node, "gate or up is read elsewhere too")
            else:
                _rewrite(gm, node, linear)
                result.matched += 1
                result.launches_saved += 1
                result.bytes_saved += 2 * size * dtype_of(linear).itemsize


def _rewrite(gm: GraphModule, node: Node, linear: Node) -> None:
    activation = "silu"
    if calls(node, _ops.gelu_mul.default):
        activation = "gelu_tanh" if node.args[2] == "tanh" else "gelu"
    args = (*call_arguments(linear).values(), activation)
    with gm.graph.inserting_before(node):
        fused = insert_call(gm.graph, _ops.linear_affine_gated.default, args, like=node)
    replace(node, fused)


def _reads_alone(node: Node, linear: Node) -> bool:
    """Whether only the halves (slices, or parts of one split) read the linear, and only node reads them."""
    halves = node.args[:2]
    cuts = [user for user in linear.users if user not in halves]
    readers = [reader for cut in cuts for reader in cut.users]
    return all(len(half.users) == 1 for half in halves) and all(reader in halves for reader in readers)
