"""Streams the weights of a plan through its method, one linear at a time, into the workspace."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.calibrate_plan import calibrate_plan
from qcompiler.calibration import Calibration
from qcompiler.calibration.runner import PartStore
from qcompiler.kernels.formats import get_format
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.overlap import Behind, ahead
from qcompiler.passes import QuantizedLinear
from qcompiler.passes.quantized_weights import expert_matrices
from qcompiler.passes.weights import Quantized, recipe_of, resolve
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.report import LayerReport


class WeightStream:
    """Final tensors of a planned graph by name: from the checkpoint, or quantized and kept in the workspace.

    Holds the tensors of one layer, the weight of the next, which is read meanwhile, and what is still being
    written of the one before; of experts, fp32 copies of one matrix at a time.
    """

    def __init__(self, plan: CompilePlan, workspace: PartStore):
        self._plan = plan
        self._workspace = workspace
        self._kept: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self._calibration: Calibration | None = None

    def original(self, graph: GraphModule, name: str) -> torch.Tensor:
        """The tensor that the float graph calls `name`, in the artifact's dtype, on the CPU."""
        return resolve(recipe_of(graph, name), self._load)

    def tensor(self, graph: GraphModule, name: str) -> torch.Tensor:
        """The tensor that `graph` calls `name`, as its recipe says; norms as calibration tuned them."""
        return resolve(recipe_of(graph, name), self._load_tuned, self._parts)

    def quantize_all(self, progress: Progress) -> list[LayerReport]:
        """Quantize every planned linear that the workspace does not hold yet."""
        if isinstance(self._plan.method, CalibratedMethod):
            self._calibration = calibrate_plan(self._plan, self._workspace, progress)
        calibrated = {} if self._calibration is None else self._calibration.specs
        # Their weights, in this order, are read by one thread alone; finished layers are not read again.
        read = [x for x in self._plan.layers if x.name in calibrated or not self._workspace.finished(x.name)]
        done = {x.name: self._workspace.finished(x.name) for x in self._plan.layers if x not in read}
        reports = []
        with (
            closing(ahead(read, self._plan_weight)) as weights,
            Behind() as behind,
            progress.stage("quantize", len(self._plan.layers)) as advance,
        ):
            for layer in self._plan.layers:
                info = done.get(layer.name)
                if info is None and self._calibration is not None and layer.name in calibrated:
                    info = self._calibrated(layer, next(weights), self._calibration)
                elif info is None:
                    stored, info = self._quantize(layer, next(weights))
                    behind.submit(self._workspace.store, layer.name, stored, info)
                    del stored
                reports.append(LayerReport(**info))
                advance(layer.name)
        return reports

    def _load(self, name: str) -> torch.Tensor:
        value = captured_constant(self._plan, name)
        if value is not None:
            return value
        tensor = self._plan.checkpoint.tensor(name)
        return tensor.to(self._plan.dtype) if tensor.is_floating_point() else tensor

    def _load_tuned(self, name: str) -> torch.Tensor:
        if self._calibration is not None and name in self._calibration.parameters:
            return self._calibration.parameter(name).to(self._plan.dtype)
        return self._load(name)

    def _parts(self, recipe: Quantized) -> Mapping[str, torch.Tensor]:
        if self._kept is None or self._kept[0] != recipe.name:
            calibrated = self._calibration is not None and recipe.name in self._calibration.specs
            holder = self._calibration.tensors if calibrated else self._workspace.load  # type: ignore[union-attr]
            self._kept = (recipe.name, holder(recipe.name))
        return self._kept[1]

    def _calibrated(
        self, layer: QuantizedLinear, weight: torch.Tensor, calibration: Calibration
    ) -> dict[str, Any]:
        found = calibration.tensors(layer.name)
        tensors = {part: tensor.to(weight.device) for part, tensor in found.items()}
        error, total = squared_error(weight.float(), layer, tensors)
        return report_of(layer, error / total if total else 0.0)

    def _plan_weight(self, layer: QuantizedLinear) -> torch.Tensor:
        """The layer's float weight as the checkpoint holds it."""
        return resolve(recipe_of(self._plan.captured.graph, layer.weight), self._plan.checkpoint.tensor)

    def _quantize(
        self, layer: QuantizedLinear, weight: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A layer's stored tensors, and the fields of its report."""
        plan, format_ = self._plan, get_format(layer.format)
        method, options = plan.method_of(layer)
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
        report = report_of(layer, error / total if total else 0.0)
        return (format_.concat(layer.spec, parts) if experts else dict(parts[0])), report


def report_of(layer: QuantizedLinear, relative_error: float) -> dict[str, Any]:
    """The fields of a `LayerReport`."""
    return {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "bits": getattr(layer.spec, "bits", 0),
        "bits_per_weight": layer.bits_per_weight,
        "relative_error": relative_error,
    }


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
