"""`--method auto`: every linear by the method of its format; an allocation has decided the formats.

On calibration text affine weights are rounded as gptq does and additive ones fitted as aqlm does, its
fine-tuning included; without text affine weights take hqq's search. lut4 and int8 are bnb's and eetq's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.calibration.task import BlockResult, BlockTask
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import ADDITIVE, AFFINE, AffineSpec, get_format
from qcompiler.methods.aqlm.finetune import tune, window_error
from qcompiler.methods.aqlm.layer import Fitted, corrected_weight, fit_layer, make_metric
from qcompiler.methods.aqlm.method import AQLM, layer_settings, stored_tensors, tuning_settings
from qcompiler.methods.base import Method, MethodOption, get_method
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.methods.gptq import GPTQ, feedback_codes

# storage format -> the data-free method that fills it
_DATA_FREE = {"affine": "hqq", "lut4": "bnb", "int8_channel": "eetq", "additive": "aqlm"}


class DataFreeAuto(Method):
    """Each weight by the data-free method of its format."""

    name = "auto"
    summary = "a format for each linear, chosen for the least loss at a target size"
    format_name: ClassVar[str] = AFFINE.name
    bits: ClassVar[tuple[int, ...]] = GPTQ.bits

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> AffineSpec:
        """See `Method.resolve_spec`: of linears that the user fixes; an allocation decides the others."""
        return get_method("hqq").resolve_spec(bits, group_size)

    def quantize(
        self, weight: Tensor, spec: Any, options: Mapping[str, Any] | None = None, *, name: str = "weight"
    ) -> dict[str, Tensor]:
        """See `Method.quantize`."""
        return get_method(_DATA_FREE[spec.name]).quantize(weight, spec, name=name)


class Auto(DataFreeAuto, CalibratedMethod):
    """Each weight by the best method of its format on calibration text."""

    options: ClassVar[Mapping[str, MethodOption]] = {
        "epochs": MethodOption(2, help="passes over the text that fine-tune blocks with additive weights"),
    }

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """See `CalibratedMethod.quantize_block`."""
        damping = GPTQ().validate({})["damping"]
        aqlm = AQLM().validate({"epochs": self.validate(task.options)["epochs"]})
        fixed: dict[str, dict[str, Tensor]] = {}
        fitted: dict[str, Fitted] = {}
        current: dict[str, Tensor] = {}
        for stage in task.stages():
            moments = task.moments(stage, current)
            made: dict[str, Tensor] = {}
            for linear in stage:
                spec, weight = task.specs[linear.name], task.weights[linear.weight]
                if spec.name == ADDITIVE.name:
                    settings = layer_settings(aqlm)
                    metric = make_metric(moments, spec, settings.damping)
                    target = corrected_weight(weight, moments, metric)
                    fitted[linear.name] = fit_layer(target, metric, spec, settings, task.seed)
                    made[linear.weight] = fitted[linear.name].weight()
                    continue
                if spec.name == AFFINE.name:
                    stored = AFFINE.pack(spec, *feedback_codes(weight, moments, spec, damping))
                else:
                    stored = self.quantize(weight, spec, name=linear.name)
                fixed[linear.name] = stored
                made[linear.weight] = _restored(spec, stored, linear.in_features)
            current.update(made)
        tensors = fixed
        vectors: dict[str, Tensor] = {}
        info: dict[str, float] = {}
        if fitted:
            frozen = {task.linears[name].weight: current[task.linears[name].weight] for name in fixed}
            fitted, vectors, info = _tuned(task, fitted, frozen, aqlm)
            tensors = {**fixed, **{n: stored_tensors(task.specs[n], layer) for n, layer in fitted.items()}}
        weights = {
            task.linears[name].weight: _restored(task.specs[name], stored, task.linears[name].in_features)
            for name, stored in tensors.items()
        }
        return BlockResult(tensors, dict(task.specs), {**weights, **vectors}, dict(info))


def auto_method(*, calibrated: bool) -> Method:
    """The method that fills an allocation's formats."""
    return Auto() if calibrated else DataFreeAuto()


def _tuned(
    task: BlockTask, fitted: dict[str, Fitted], frozen: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Fitted], dict[str, Tensor], dict[str, float]]:
    """Fine-tune the block's codebooks, norms and biases while its other linears are quantized already."""

    def loss(window: int, moved: dict[str, Tensor]) -> Tensor:
        return window_error(task, window, {**frozen, **moved})

    return tune(
        loss,
        task.windows,
        fitted,
        {name: task.linears[name].weight for name in fitted},
        {name: task.weights[name] for name in task.tunable()},
        tuning_settings(options),
        task.seed,
    )


def _restored(spec: Any, stored: Mapping[str, Tensor], in_features: int) -> Tensor:
    if spec.name not in _DATA_FREE:
        raise InvalidInputError(f"auto has no method for format {spec.name!r}")
    weight: Tensor = get_format(spec.name).dequantize(spec, stored, in_features, torch.float32)
    return weight
