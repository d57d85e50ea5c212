"""Streams the weights of a plan through its method, one linear at a time, into the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qcompiler.kernels.formats import get_format
from qcompiler.passes import QuantizedLinear
from qcompiler.passes.weights import Quantized, recipe_of, resolve
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.report import LayerReport
from qcompiler.workspace import Workspace


class WeightStream:
    """Final tensors of a planned graph by name: from the checkpoint, or quantized and kept in the workspace.

    Holds the tensors of one layer at most.
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
        plan = self._plan
        weight = resolve(recipe_of(plan.captured.graph, layer.weight), plan.checkpoint.tensor).to(plan.device)
        tensors = plan.method.quantize(weight, layer.spec, plan.method_options, name=layer.weight)
        report = {
            "name": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bits": getattr(layer.spec, "bits", 0),
            "bits_per_weight": get_format(layer.format).bits_per_weight(
                layer.spec, layer.out_features, layer.in_features
            ),
            "relative_error": relative_error(weight, layer, tensors),
        }
        self._workspace.store(layer.name, dict(tensors), report)
        return report


def captured_constant(plan: CompilePlan, name: str) -> torch.Tensor | None:
    """A tensor that the captured graph itself holds (rotary frequencies), or None if it is a weight."""
    owner: Any = plan.captured.graph
    for part in name.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            return None
    return owner.detach() if isinstance(owner, torch.Tensor) and not owner.is_meta else None


def relative_error(
    weight: torch.Tensor, layer: QuantizedLinear, tensors: Mapping[str, torch.Tensor]
) -> float:
    """|W − dequantized|² / |W|², summed in float64; 0 for a weight of zeros."""
    stored = get_format(layer.format).dequantize(layer.spec, tensors, layer.in_features, torch.float32)
    total = float(weight.float().square().sum(dtype=torch.float64))
    error = float((weight.float() - stored).square_().sum(dtype=torch.float64))
    return error / total if total else 0.0
