"""A Dynamo graph as the graph that passes read: aten ops, parameters held by the module on meta.

Dynamo's graph calls torch functions and takes every parameter as an input. It is
traced once more to pre-dispatch aten ops (torch.export's), under Dynamo's own fake
tensors, so that its symbolic sizes and guards stay. Inputs that are parameters
become tensors of the graph module, named as the user's model names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError
from qcompiler.passes.graph_utils import Node, get_attribute, insert_attribute, is_mutated, set_attribute

# Members in the expression by which Dynamo reaches a tensor: L['self']._modules['fc']._parameters['weight'].
_MEMBER = re.compile(r"\.(?:_modules|_parameters|_buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Traced:
    """A graph for the passes.

    Attributes:
        graph: aten ops; placeholders are Dynamo's inputs that are no parameters, in their order.
        inputs: Position among Dynamo's inputs of each placeholder.
        parameters: Name on the graph module → position among Dynamo's inputs.
        sources: Dynamo's own description of where each placeholder's value comes from.
        static: Whether each placeholder's memory stays where it is (buffers).
    """

    graph: GraphModule
    inputs: list[int]
    parameters: dict[str, int]
    sources: list[Any]
    static: list[dict[str, Any]]


def trace(gm: GraphModule, example_inputs: Sequence[Any]) -> Traced:
    """Trace a Dynamo graph.

    Args:
        gm: What Dynamo gives to a backend.
        example_inputs: Its inputs: tensors, symbolic integers, and the real parameters.

    Raises:
        UnsupportedModelError: The graph switches autocast on.
        InvalidInputError: It comes from elsewhere than Dynamo, or an input wants a gradient.
    """
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if not all("example_value" in node.meta for node in given):
        raise InvalidInputError(
            "the graph does not come from Dynamo: its inputs carry no fake values",
            hint="Call torch.compile; for an exported graph use qcompiler.passes.PassManager.",
        )
    _check_autocast(gm)
    fakes = [node.meta["example_value"] for node in given]
    parameters = [i for i, item in enumerate(example_inputs) if type(item) is torch.nn.Parameter]
    _check_gradients([item for i, item in enumerate(fakes) if i not in set(parameters)])
    modes = [item.fake_mode for item in fakes if isinstance(item, FakeTensor)]
    with torch.no_grad(), modes[0] if modes else nullcontext():
        graph = make_fx(_FixedScalars(gm).run, pre_dispatch=True)(*fakes)
    if modes:
        _refake_constants(graph, modes[0])
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    _drop_grad_mode(graph)
    held: dict[str, int] = {}
    for position in parameters:
        # A parameter that the graph itself writes to stays an input.
        if not is_mutated(placeholders[position]):
            name = _unique(parameter_name(given[position]), held)
            held[name] = position
            _hold(graph, placeholders[position], name)
    graph.graph.lint()
    graph.recompile()
    inputs = [i for i in range(len(given)) if i not in set(held.values())]
    return Traced(
        graph,
        inputs,
        held,
        [getattr(given[i], "_dynamo_source", None) for i in inputs],
        [given[i].meta.get("tensor_dict") or {} for i in inputs],
    )


def source_name(node: fx.Node) -> str:
    """The Python expression by which Dynamo reaches an input; empty for other nodes."""
    name: Any = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)  # a method in older versions of torch


def parameter_name(node: fx.Node) -> str:
    """Name of a parameter in the user's model, as far as Dynamo tells; else the name of its input."""
    text = source_name(node)
    root = re.match(r"[LG]\['[^']*'\]", text)
    if root is not None:
        parts = [a or b for a, b in _MEMBER.findall(text[root.end() :])]
        parts = [part for part in parts if part != "cell_contents"]
        if parts:
            return ".".join(parts)
    return str(node.target)


class _FixedScalars(fx.Interpreter):
    """Runs Dynamo's graph with the floats of modules (an epsilon) as numbers, which passes can read.

    With dynamic shapes Dynamo hands them in as symbols; turning one into a number adds a guard on it.
    A float that the caller passes, such as a temperature, stays a symbol and may vary.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        held = any("." in source_name(source) for source in n.all_input_nodes)
        if held and isinstance(result, torch.SymFloat) and result.node.has_hint():
            return float(result)
        return result


def _refake_constants(gm: GraphModule, mode: FakeTensorMode) -> None:
    """Tensors that the user's code writes out get values of the mode of all others."""
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(get_attribute(gm, str(node.target)), static_shapes=True)


def _unique(name: str, taken: dict[str, int]) -> str:
    if name not in taken:
        return name
    head, dot, tail = name.rpartition(".")
    count = 1
    while f"{head}_{count}{dot}{tail}" in taken:
        count += 1
    return f"{head}_{count}{dot}{tail}"


def _hold(gm: GraphModule, placeholder: Node, name: str) -> None:
    """Turn an input into a tensor of the module, of which only shape and dtype are known here."""
    fake = placeholder.meta["val"]
    meta = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")
    set_attribute(gm, name, meta)
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        held = insert_attribute(gm, name)
    held.meta["val"] = fake
    placeholder.replace_all_uses_with(held)
    gm.graph.erase_node(placeholder)


def _drop_grad_mode(gm: GraphModule) -> None:
    """Inference has no use for switches of the gradient mode."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is torch._C._set_grad_enabled and not node.users:
            gm.graph.erase_node(node)


def _check_autocast(gm: GraphModule) -> None:
    entered = any("autocast" in str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    if entered or any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        raise UnsupportedModelError(
            "autocast is on: it chooses dtypes op by op, and a quantized linear is none that it knows",
            hint="Cast the model once instead, e.g. model.to(torch.bfloat16), and drop autocast.",
        )


def _check_gradients(values: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(item, torch.Tensor) and item.requires_grad for item in values
    ):
        raise InvalidInputError(
            "an input of the graph wants a gradient, and quantized linears have none",
            hint="Call the model under torch.no_grad() or torch.inference_mode().",
        )
