"""What the quantizing passes share: what was quantized, and the registration of its stored tensors.

Expert weights [experts, out, in] are stored as the one matrix [experts·out, in],
expert after expert, and quantized one expert at a time, so that a method that
looks at a whole weight sees one expert.
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
from qcompiler.kernels.formats.base import GroupedFormat, TensorSpec, get_format
from qcompiler.passes.base import PassResult
from qcompiler.passes.graph_utils import Node, insert_attribute, module_path, remove_attribute
from qcompiler.passes.weights import (
    ExpertRows,
    Quantized,
    layer_name,
    recipe_of,
    register_weight,
    weight_of,
    weight_recipes,
)

# Name of a linear whose weight told it before another pass took the weight's other readers away.
NAME = "layer_name"

Choose = Callable[[str, int, int], Any]
QuantizeWeight = Callable[[str, torch.Tensor, Any], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class QuantizedLinear:
    """One weight that was quantized.

    Attributes:
        name: The layer, e.g. `model.layers.0.mlp.up_proj`; its tensors are `<name>.<part>`.
        weight: Name of the float weight that it came from.
        bias: Name of its bias, which stays float, if any.
        format: Name of the storage format.
        spec: The format's spec.
        out_features: Rows of the stored weight; of experts, those of all of them.
        in_features: Columns of the weight.
        kind: "linear", "experts" or "embedding".
        experts: How many experts the rows are divided among.
        transposed: The float weight is [experts, in, out].
        shared_with: Linears that read the tensors of an embedding (a tied head).
    """

    name: str
    weight: str
    bias: str | None
    format: str
    spec: Any
    out_features: int
    in_features: int
    kind: str = "linear"
    experts: int = 1
    transposed: bool = False
    shared_with: tuple[str, ...] = ()

    @property
    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of its stored tensors."""
        format_ = get_format(self.format)
        if self.kind != "experts":
            return format_.tensor_specs(self.spec, self.out_features, self.in_features)
        if not isinstance(format_, GroupedFormat):
            raise InvalidInputError(f"format {self.format} has no op for expert weights")
        rows = self.out_features // self.experts
        return format_.grouped_tensor_specs(self.spec, self.experts, rows, self.in_features)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, padding, scales, everything."""
        return sum(tensor.nbytes for tensor in self.tensor_specs.values())

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes / (self.out_features * self.in_features)


@dataclass
class QuantizeResult(PassResult):
    """`skipped` names layers, not nodes."""

    quantized: list[QuantizedLinear] = field(default_factory=list)


def register_quantized(gm: GraphModule, layer: QuantizedLinear, quantize: QuantizeWeight | None) -> None:
    """Register the stored tensors of a layer under `<name>.<part>` with their recipes.

    Raises:
        InvalidInputError: `quantize` gives tensors that the format does not store.
    """
    format_ = get_format(layer.format)
    expected = layer.tensor_specs
    source, weight = recipe_of(gm, layer.weight), weight_of(gm, layer.weight)
    given: Mapping[str, torch.Tensor] | None = None
    if quantize is not None and not weight.is_meta:
        if layer.kind == "experts":
            matrices = expert_matrices(weight.detach(), transposed=layer.transposed)
            given = format_.concat(layer.spec, [quantize(layer.name, one, layer.spec) for one in matrices])
        else:
            given = quantize(layer.name, weight.detach(), layer.spec)
        _check(layer.name, layer.format, given, expected)
    if layer.kind == "experts":
        source = ExpertRows(source, layer.transposed)
    if layer.name == layer.weight:
        # A bare parameter makes room for a module of its name, which holds the stored tensors.
        remove_attribute(gm, layer.weight)
        weight_recipes(gm).pop(layer.weight, None)
    for part, tensor in expected.items():
        real = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if given is None else given[part]
        recipe = Quantized(source, layer.format, layer.spec, part, layer.name)
        register_weight(gm, f"{layer.name}.{part}", recipe, real)


def expert_matrices(weight: torch.Tensor, *, transposed: bool) -> list[torch.Tensor]:
    """The experts of a weight as matrices [out, in], views of it."""
    return [matrix.t() if transposed else matrix for matrix in weight]


def insert_stored(gm: GraphModule, layer: QuantizedLinear) -> dict[str, Node]:
    """Nodes that read the stored tensors of a layer, at the insertion point."""
    return {part: insert_attribute(gm, f"{layer.name}.{part}") for part in layer.tensor_specs}


def readers_of(gm: GraphModule, fqn: str) -> list[Node]:
    """Nodes that read the parameter `fqn`, in graph order."""
    readers: set[Any] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and str(node.target) == fqn:
            readers.update(node.users)
    return sorted(readers)


def reader_name(node: Node, weight: Node) -> str:
    """The layer that `node` is: told by its weight, or by its module where others read that weight too."""
    if NAME in node.meta:
        return str(node.meta[NAME])
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
