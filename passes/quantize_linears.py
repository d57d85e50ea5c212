"""`aten.linear` and grouped linears → the ops of a storage format, as a chooser decides layer by layer.

On a meta graph only shapes and recipes are registered, and the caller streams
the weights. On a graph with real weights and a quantizer the stored tensors are
computed at once. The embedding that a tied lm_head reads keeps its raw tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import GroupedFormat, get_format
from qcompiler.kernels.formats.calls import is_linear_op
from qcompiler.passes.addmm_to_linear import linear_bias
from qcompiler.passes.base import Pass
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    insert_call,
    is_parameter,
    is_tensor,
    module_path,
    op_name,
    rank_of,
    replace,
    shape_of,
)
from qcompiler.passes.quantized_weights import (
    Choose,
    QuantizedLinear,
    QuantizeResult,
    QuantizeWeight,
    insert_stored,
    reader_name,
    readers_of,
    register_quantized,
)
from qcompiler.passes.weights import layer_name

_GROUPED = torch.ops.qcompiler.grouped_linear.default


class QuantizeLinears(Pass):
    """Replaces linears by quantized ones, those of experts (3-D weights of `grouped_linear`) too.

    Args:
        choose: (layer name, out_features, in_features) → the spec to quantize with, or a string
            saying why the layer stays as it is; of experts, out_features are those of all together.
        quantize: (layer name, weight [out_features, in_features], spec) → stored tensors by part.
            Used where weights are real, for each expert by itself; without it the stored tensors stay
            on meta, to be made from the recipes.
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
        experts: set[str] = set()
        for node in list(gm.graph.nodes):
            for weight in _batched_weights(node):
                result.skip(layer_name(weight), "a batched product over all experts: no format has its op")
            if not calls(node, aten.linear.default, _GROUPED):
                continue
            if not is_parameter(node.args[1]):
                result.skip(module_path(node) or node.name, "its weight is computed, not a parameter")
            elif calls(node, aten.linear.default):
                self._quantize(gm, node, result, done)
            elif str(node.args[1].target) not in experts:
                experts.add(str(node.args[1].target))
                self._quantize_experts(gm, node, result)

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
            known = QuantizedLinear(
                name,
                fqn,
                str(bias.target) if bias is not None else None,
                spec.name,
                spec,
                out_features,
                in_features,
            )
            register_quantized(gm, known, self.quantize)
            done[name] = known
            result.quantized.append(known)
        with gm.graph.inserting_before(node):
            tensors = insert_stored(gm, known)
            op, args = format_.op_call(spec, node.args[0], tensors, bias, in_features)
            replace(node, insert_call(gm.graph, op, args, like=node))
        result.matched += 1

    def _quantize_experts(self, gm: GraphModule, first: Node, result: QuantizeResult) -> None:
        """Rewrite every grouped linear over the weight that `first` reads."""
        fqn = str(first.args[1].target)
        name = layer_name(fqn)
        transposed = bool(argument(first, 4, "transposed", False))
        experts, outputs, inputs = map(int, shape_of(first.args[1]))
        if transposed:
            outputs, inputs = inputs, outputs
        readers = readers_of(gm, fqn)
        if any(not calls(n, _GROUPED) or argument(n, 4, "transposed", False) != transposed for n in readers):
            result.skip(name, "its weights are read in another way too")
            return
        spec = self.choose(name, experts * outputs, inputs)
        if isinstance(spec, str):
            result.skip(name, spec)
            return
        format_ = get_format(spec.name)
        if not isinstance(format_, GroupedFormat):
            result.skip(name, f"format {spec.name} has no op for expert weights")
            return
        try:
            format_.grouped_tensor_specs(spec, experts, outputs, inputs)
        except InvalidInputError as error:
            result.skip(name, error.message)
            return
        bias = argument(first, 3, "bias")
        layer = QuantizedLinear(
            name,
            fqn,
            str(bias.target) if is_parameter(bias) else None,
            spec.name,
            spec,
            experts * outputs,
            inputs,
            kind="experts",
            experts=experts,
            transposed=transposed,
        )
        register_quantized(gm, layer, self.quantize)
        result.quantized.append(layer)
        for node in readers:
            with gm.graph.inserting_before(node):
                tensors, bias = insert_stored(gm, layer), argument(node, 3, "bias")
                op, args = format_.grouped_op_call(spec, node.args[0], tensors, node.args[2], bias, inputs)
                replace(node, insert_call(gm.graph, op, args, like=node))
            result.matched += 1


def _batched_weights(node: Node) -> list[str]:
    """Names of the 3-D parameters that a batched matrix product reads."""
    if not calls(node, aten.bmm.default, aten.matmul.default):
        return []
    return [str(item.target) for item in node.args[:2] if is_parameter(item) and rank_of(item) == 3]


def linear_name(node: Node) -> str:
    """The layer that a linear is: told by its weight, or by its module where the weight is tied."""
    return reader_name(node, node.args[1])


def is_quantized_linear(node: Any) -> bool:
    """True for a linear over the tensors of a storage format."""
    return is_linear_op(op_name(node))


def linear_like(node: Any) -> bool:
    """True for any linear, float or quantized."""
    return is_quantized_linear(node) or (
        calls(node, aten.linear.default) and is_tensor(node) and rank_of(node.args[1]) == 2
    )
