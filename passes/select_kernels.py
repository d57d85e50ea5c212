"""Chooses, for one device, the op that runs each quantized linear, and repacks its tensors once.

For graphs that are run directly (someone else's, with real weights). The
runtime makes the same choice by the same providers when it loads an artifact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    calls,
    dtype_of,
    get_attribute,
    insert_attribute,
    insert_call,
    is_parameter,
    op_name,
    replace,
    set_attribute,
)
from qcompiler.passes.weights import weight_of

_ops = torch.ops.qcompiler
_SELECTED = (_ops.linear_affine.default, _ops.linear_affine_gated.default, _ops.linear_body_tail.default)


class SelectKernels(Pass):
    """`linear_affine`, gated or not, and `linear_body_tail` → the op of the best provider for a device.

    Args:
        device: Where the graph will run.
        lean: Prefer little memory over speed on long prompts.
    """

    name = "select_kernels"
    # A provider may round scales to what its kernel holds, e.g. bfloat16.
    changes_numerics = True

    def __init__(self, device: torch.device | str, *, lean: bool = False):
        self.device = torch.device(device)
        self.lean = lean

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            if not calls(node, *_SELECTED):
                continue
            reason = self._select(gm, node)
            if reason is None:
                result.matched += 1
            else:
                result.skip(node, reason)

    def _select(self, gm: GraphModule, node: Node) -> str | None:
        from qcompiler.kernels.providers import select_provider

        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
        x = given.pop("x")
        nodes = {name: item for name, item in given.items() if isinstance(item, fx.Node)}
        attributes: dict[str, Any] = {
            name: item for name, item in given.items() if isinstance(item, (int, float, str))
        }
        if not all(map(is_parameter, nodes.values())):
            return "its weight is computed, not a parameter"
        tensors = {name: weight_of(gm, str(item.target)) for name, item in nodes.items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            return "its weights are on meta; the choice is made where they are loaded"
        provider = select_provider(
            str(op_name(node)), attributes, tensors, self.device, dtype_of(x), lean=self.lean
        )
        if provider.op is node.target:
            return f"the canonical op is the best for {self.device}"
        prepared, settings = provider.prepare(tensors, attributes)
        prefix = str(nodes["low"].target).removesuffix(".low")
        with gm.graph.inserting_before(node):
            arguments: dict[str, Node] = {}
            for part, tensor in prepared.items():
                name = (
                    _name(part, tensor, tensors, nodes)
                    or f"{prefix}.{provider.name.replace('-', '_')}_{part}"
                )
                if get_attribute(gm, name) is None:
                    set_attribute(gm, name, tensor)
                arguments[part] = insert_attribute(gm, name)
            fused = insert_call(gm.graph, provider.op, provider.bind(x, arguments, settings), like=node)
        replace(node, fused)
        return None


def _name(
    part: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor], nodes: dict[str, Node]
) -> str | None:
    """Name of a tensor that the provider keeps as it was."""
    return str(nodes[part].target) if part in nodes and tensors[part] is tensor else None
