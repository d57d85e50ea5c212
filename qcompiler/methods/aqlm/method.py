"""AQLM: additive codebooks fitted to calibration text, block by block (Egiazarian et al. 2024).

Three phases per block: codes and codebooks of each linear in the norm of its
input's Gram matrix (`layer.py`), linears that are computed later seeing the
earlier ones quantized; fine-tuning against the block's target (`finetune.py`);
rounding of codebooks and scales to float16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qcompiler.calibration.task import BlockResult, BlockTask
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import ADDITIVE, AdditiveSpec
from qcompiler.methods.aqlm.finetune import FinetuneSettings, finetune
from qcompiler.methods.aqlm.layer import Fitted, LayerSettings, corrected_weight, fit_layer, make_metric

# Schemes by nominal bits in groups of 8: codes alone, codebooks and scales come on top.
DEFAULT_SCHEMES = {1: "1x8", 2: "2x8", 3: "3x8", 4: "4x8"}


@dataclass(frozen=True)
class Aqlm:
    """The method; settings of the two searches."""

    layer: LayerSettings = field(default_factory=LayerSettings)
    tuning: FinetuneSettings = field(default_factory=FinetuneSettings)

    name = "aqlm"
    format = "additive"

    def default_spec(self, bits: int) -> AdditiveSpec:
        """The scheme for nominal bits per weight.

        Raises:
            InvalidInputError: No scheme for these bits.
        """
        if bits not in DEFAULT_SCHEMES:
            raise InvalidInputError(
                f"aqlm has no default codebooks for {bits} bits.",
                hint=f"Choose bits from {tuple(DEFAULT_SCHEMES)}, or name a scheme such as 1x16.",
            )
        return AdditiveSpec.parse(DEFAULT_SCHEMES[bits])

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """See `CalibratedMethod`."""
        fitted: dict[str, Fitted] = {}
        current: dict[str, torch.Tensor] = {}
        for stage in task.stages():
            moments = task.moments(stage, current, task.token_weights if self.layer.relative else None)
            metrics = {}
            for linear in stage:
                spec = _additive(task.specs[linear.name], linear.name)
                if spec.group_size not in metrics:
                    metrics[spec.group_size] = make_metric(moments, spec, self.layer.damping)
                metric = metrics[spec.group_size]
                weight = corrected_weight(task.weights[linear.weight], moments, metric)
                fitted[linear.name] = fit_layer(weight, metric, spec, self.layer, task.seed)
                task.tell(f"{linear.name}: relative error {fitted[linear.name].error:.5f}")
            current.update({linear.weight: fitted[linear.name].weight() for linear in stage})
        fitted, vectors, info = finetune(task, fitted, self.tuning)
        tensors = {
            name: ADDITIVE.pack(task.specs[name], layer.codes, layer.codebooks, layer.scales)
            for name, layer in fitted.items()
        }
        weights = {
            task.linears[name].weight: ADDITIVE.dequantize(
                task.specs[name], stored, task.linears[name].in_features, torch.float32
            )
            for name, stored in tensors.items()
        }
        figures = {"layer_error": {name: layer.error for name, layer in fitted.items()}, **info}
        return BlockResult(tensors, dict(task.specs), {**weights, **vectors}, figures)


def _additive(spec: object, name: str) -> AdditiveSpec:
    if not isinstance(spec, AdditiveSpec):
        raise InvalidInputError(f"{name}: aqlm stores the additive format, not {spec!r}.")
    return spec
