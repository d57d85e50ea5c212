"""Streams the weights of a plan through its method, one linear at a time, into the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompiler.kernels.formats import get_format
from qcompiler.passes import QuantizedLinear
from qcompiler.passes.quantized_weights import expert_matrices
from qcompiler.passes.weights import Quantized, recipe_of, resolve
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.report import LayerReport
from qcompiler.workspace import Workspace


class WeightStream:
    """Final tensors of a planned graph by name: from the checkpoint, or quantized and kept in the workspace.

    Holds the tensors of one layer at most; of experts, fp32 copies of one matrix at a time.
    """

    def __init__(self, plan: CompilePlan, workspace: Workspace):
        self._plan = plan
        self._workspace = workspace
        self._kept: tuple[str, dict[str, torch.Tensor]] | None = None

    def load(self, name: str) -> torch.Tensor:
        """A float tensor of the captured model in the artifact's dtype, on the CPU."""
        value = captured_constant(self._plan, name)
        if value is not None:
            return value
        tensor = self._plan.checkpoint.tensor(name)
        return tensor.to(self._plan.dtype) if tensor.is_floating_point() else tensor

    def tensor(self, graph: torch.fx.GraphModule, name: str) -> torch.Tensor:
        """The tensor that `graph` calls `name`, as its recipe says."""
        return resolve(recipe_of(graph, name), self.load, self._parts)

    def quantize_all(self, progress: Progress) -> list[LayerReport]:
        """Quantize every planned linear that the workspace does not hold yet."""
        reports = []
        with progress.stage("quantize", len(self._plan.layers)) as advance:
            for layer in self._plan.layers:
                info = self._workspace.finished(layer.name)
                if info is None:
                    info = self._quantize(layer)
                reports.append(LayerReport(**info))
                advance(layer.name)
        return reports

    def _parts(self, recipe: Quantized) -> Mapping[str, torch.Tensor]:
        if self._kept is None or self._kept[0] != recipe.name:
            self._kept = (recipe.name, self._workspace.load(recipe.name))
        return self._kept[1]

    def _quantize(self, layer: QuantizedLinear) -> dict[str, Any]:
        plan, format_ = self._plan, get_format(layer.format)
        method, options = plan.method_of(layer)
        weight = resolve(recipe_of(plan.captured.graph, layer.weight), plan.checkpoint.tensor)
        experts = layer.kind == "experts"
        matrices = expert_matrices(weight, transposed=layer.transposed) if experts else [weight]
        parts, error, total = [], 0.0, 0.0
        for index, matrix in enumerate(matrices):
            # One expert at a time on the device and in fp32, whatever the layer's size.
            moved = matrix.to(plan.device).contiguous()
            name = f"{layer.weight}[{index}]" if experts else layer.weight
            tensors = method.quantize(moved, layer.spec, options, name=name)
            squares = squared_error(moved, layer, tensors)
            error, total = error + squares[0], total + squares[1]
            parts.append({part: tensor.cpu() for part, tensor in tensors.items()} if experts else tensors)
        report = {
            "name": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bits": getattr(layer.spec, "bits", 0),
            "bits_per_weight": format_.bits_per_weight(layer.spec, layer.out_features, layer.in_features),
            "relative_error": error / total if total else 0.0,
        }
        stored = format_.concat(layer.spec, parts) if experts else dict(parts[0])
        self._workspace.store(layer.name, stored, report)
        return report


def captured_constant(plan: CompilePlan, name: str) -> torch.Tensor | None:
    """A tensor that the captured graph itself holds (rotary frequencies), or None if it is a weight."""
    owner: Any = plan.captured.graph
    for part in name.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            return None
    return owner.detach() if isinstance(owner, torch.Tensor) and not owner.is_meta else None


def squared_error(
    weight: torch.Tensor, layer: QuantizedLinear, tensors: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """|W − dequantized|² and |W|², summed in float64."""
    stored = get_format(layer.format).dequantize(layer.spec, tensors, layer.in_features, torch.float32)
    total = float(weight.float().square().sum(dtype=torch.float64))
    return float((weight.float() - stored).square_().sum(dtype=torch.float64)), total
