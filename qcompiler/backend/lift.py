"""The tensors of a lowered graph as its inputs, described as Dynamo describes a module's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.backend.trace import Traced


def lift(
    lowered: GraphModule, traced: Traced, tensors: dict[str, torch.Tensor], dynamo: GraphModule
) -> list[str]:
    """Make every tensor of the graph an input behind the others; returns their names in order.

    Inputs carry what AOTAutograd wants to know of Dynamo's: where they come from, and that the
    stored tensors stay where they are, so that CUDA graphs do not copy them.
    """
    graph = lowered.graph
    own: list[Any] = [node for node in graph.nodes if node.op == "placeholder"]
    for node, source, facts in zip(own, traced.sources, traced.static, strict=True):
        node._dynamo_source = source
        node.meta["tensor_dict"] = facts
    last = own[-1] if own else None
    for index, name in enumerate(tensors):
        readers = [node for node in graph.nodes if node.op == "get_attr" and node.target == name]
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
            last = graph.placeholder(f"stored_{index}_{name.replace('.', '_')}")
        last.meta = {"val": readers[0].meta["val"], "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        last._dynamo_source = None
        for node in readers:
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        delattr(lowered.get_submodule(owner), leaf)
    graph.lint()
    lowered.recompile()
    if "dynamo_compile_id" in dynamo.meta:
        lowered.meta["dynamo_compile_id"] = dynamo.meta["dynamo_compile_id"]
        vars(lowered)["_param_name_to_source"] = {}
    return list(tensors)


def read_tensors(gm: GraphModule) -> list[str]:
    """Names of the tensors that a graph reads, in the order of first use."""
    return list(dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "get_attr"))
