"""`aten.linear` → the op of a storage format, as a chooser decides layer by layer.

On a meta graph only shapes and recipes are registered, and the caller streams
the weights. On a graph with real weights and a quantizer the stored tensors are
computed at once. The embedding that a tied lm_head reads keeps its raw tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

import qcompiler.kernels.formats.affine
import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes.addmm_to_linear import linear_bias
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    aten,
    calls,
    insert_attribute,
    insert_call,
    is_parameter,
    is_tensor,
    module_path,
    rank_of,
    replace,
    shape_of,
)
from qcompiler.passes.weights import Quantized, layer_name, recipe_of, register_weight, weight_of

Choose = Callable[[str, int, int], Any]
QuantizeWeight = Callable[[str, torch.Tensor, Any], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear that was quantized.

    Attributes:
        name: The layer, e.g. `model.layers.0.mlp.up_proj`; its tensors are `<name>.<part>`.
        weight: Name of the float weight that it came from.
        bias: Name of its bias, which stays float, if any.
        format: Name of the storage format.
        spec: The format's spec.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
    """

    name: str
    weight: str
    bias: str | None
    format: str
    spec: Any
    out_features: int
    in_features: int


@dataclass
class QuantizeResult(PassResult):
    """`skipped` names layers, not nodes."""

    quantized: list[QuantizedLinear] = field(default_factory=list)


class QuantizeLinears(Pass):
    """Replaces linears by quantized ones.

    Args:
        choose: (layer name, out_features, in_features) → the spec to quantize with, or a string
            saying why the layer stays as it is.
        quantize: (layer name, weight [out_features, in_features], spec) → stored tensors by part.
            Used where weights are real; without it the stored tensors stay on meta, to be made
            from the recipes.
    """

    name = "quantize_linears"
    required = True
    changes_numerics = True

    def __init__(self, choose: Choose, quantize: QuantizeWeight | None = None):
        self.choose = choose
        self.quantize = quantize

    def new_result(self) -> QuantizeResult:
        """A result that also lists what was quantized."""
        return QuantizeResult(self.name)

    def apply(self, gm: GraphModule, result: Any) -> None:
        """See the class."""
        done: dict[str, QuantizedLinear] = {}
        for node in list(gm.graph.nodes):
            if calls(node, torch.ops.qcompiler.grouped_linear.default) and is_parameter(node.args[1]):
                result.skip(str(node.args[1].target), "3-D expert weights: no format stores them yet")
            if not calls(node, aten.linear.default):
                continue
            if not is_parameter(node.args[1]):
                result.skip(module_path(node) or node.name, "its weight is computed, not a parameter")
                continue
            self._quantize(gm, node, result, done)

    def _quantize(
        self, gm: GraphModule, node: Node, result: QuantizeResult, done: dict[str, QuantizedLinear]
    ) -> None:
        weight, bias = node.args[1], linear_bias(node)
        fqn, name = str(weight.target), linear_name(node)
        out_features, in_features = map(int, shape_of(weight))
        if bias is not None and not is_parameter(bias):
            result.skip(name, "its bias is computed, not a parameter")
            return
        known = done.get(name)
        if known is not None and known.weight != fqn:
            result.skip(name, f"another linear of this name reads {known.weight}, this one {fqn}")
            return
        spec = known.spec if known else self.choose(name, out_features, in_features)
        if isinstance(spec, str):
            result.skip(name, spec)
            return
        format_ = get_format(spec.name)
        if known is None:
            self._register(gm, name, fqn, spec, (out_features, in_features))
            done[name] = QuantizedLinear(
                name,
                fqn,
                str(bias.target) if bias is not None else None,
                spec.name,
                spec,
                out_features,
                in_features,
            )
            result.quantized.append(done[name])
        with gm.graph.inserting_before(node):
            parts = format_.tensor_specs(spec, out_features, in_features)
            tensors = {part: insert_attribute(gm, f"{name}.{part}") for part in parts}
            op, args = format_.op_call(spec, node.args[0], tensors, bias, in_features)
            replace(node, insert_call(gm.graph, op, args, like=node))
        result.matched += 1

    def _register(self, gm: GraphModule, name: str, fqn: str, spec: Any, size: tuple[int, int]) -> None:
        expected = get_format(spec.name).tensor_specs(spec, *size)
        source, weight = recipe_of(gm, fqn), weight_of(gm, fqn)
        given: Mapping[str, torch.Tensor] | None = None
        if self.quantize is not None and not weight.is_meta:
            given = self.quantize(name, weight.detach(), spec)
            _check(name, spec.name, given, expected)
        for part, tensor in expected.items():
            real = (
                torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if given is None else given[part]
            )
            register_weight(gm, f"{name}.{part}", Quantized(source, spec.name, spec, part, name), real)


def linear_name(node: Node) -> str:
    """The layer that a linear is: told by its weight, or by its module where the weight is tied."""
    weight: Node = node.args[1]
    path = module_path(node)
    if path and any(user is not node for user in weight.users):
        return path
    return layer_name(str(weight.target))


def _check(
    name: str, format_name: str, given: Mapping[str, torch.Tensor], expected: Mapping[str, Any]
) -> None:
    for part, tensor in expected.items():
        found = given.get(part)
        if found is None or tuple(found.shape) != tuple(tensor.shape) or found.dtype != tensor.dtype:
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise InvalidInputError(
                f"{name}: the quantizer gave {what} for {part!r}, format {format_name} stores "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def is_quantized_linear(node: Any) -> bool:
    """True for a linear over the tensors of a storage format."""
    return calls(node, torch.ops.qcompiler.linear_affine.default)


def linear_like(node: Any) -> bool:
    """True for any linear, float or quantized."""
    return is_quantized_linear(node) or (
        calls(node, aten.linear.default) and is_tensor(node) and rank_of(node.args[1]) == 2
    )
