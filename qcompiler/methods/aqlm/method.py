"""AQLM: additive codebooks fitted to calibration text, block by block (Egiazarian et al. 2024).

Three phases per block: codes and codebooks of each linear in the norm of its
input's Gram matrix (`layer.py`), linears that are computed later seeing the
earlier ones quantized; fine-tuning against the block's target (`finetune.py`);
rounding of codebooks and scales to float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from qcompiler.calibration.blocks import Block
from qcompiler.calibration.task import BlockResult, BlockTask
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import ADDITIVE, GROUP_SIZES, AdditiveSpec
from qcompiler.methods.aqlm.cost import Rates, block_seconds, measure_rates
from qcompiler.methods.aqlm.finetune import FinetuneSettings, finetune
from qcompiler.methods.aqlm.layer import Fitted, LayerSettings, corrected_weight, fit_layer, make_metric
from qcompiler.methods.aqlm.phases import PhaseClock
from qcompiler.methods.aqlm.search import Metric
from qcompiler.methods.base import MethodOption
from qcompiler.methods.calibrated import CalibratedMethod


class AQLM(CalibratedMethod):
    """Additive quantization with calibration text."""

    name = "aqlm"
    _rates: ClassVar[dict[tuple[AdditiveSpec, int, torch.device], Rates]] = {}
    summary = "additive codebooks fitted to calibration text, the best at 2 bits"
    format_name: ClassVar[str] = ADDITIVE.name
    bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    default_group_size: ClassVar[int] = 8
    options: ClassVar[Mapping[str, MethodOption]] = {
        "scheme": MethodOption("", help="codebooks x bits per code, e.g. 1x16; by default 8-bit codes"),
        "beam": MethodOption(8, help="partial sums kept in the search of codes"),
        "rounds": MethodOption(4, help="rounds of codes and codebooks per linear, at most"),
        "solver": MethodOption("cg", ("cg", "adam"), "solver of the codebooks with codes fixed"),
        "damping": MethodOption(0.05, help="share of the mean diagonal added to XXᵀ"),
        "epochs": MethodOption(4, help="passes over the calibration text that fine-tune a block; 0 = none"),
        "rate": MethodOption(0.01, help="relative learning rate of the fine-tuning"),
        "code_updates": MethodOption(0, help="how often fine-tuning chooses codes anew"),
    }

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> AdditiveSpec:
        """See `Method.resolve_spec`: `bits` counts the codes alone, codebooks and scales come on top.

        Args:
            bits: Code bits per weight.
            group_size: Weights per codeword, 4, 8 or 16; None is 8.
            options: `scheme` overrides `bits`.
        """
        size = self.default_group_size if group_size is None else group_size
        scheme = str((options or {}).get("scheme", ""))
        if scheme:
            return AdditiveSpec.parse(scheme, size)
        self.check_bits(bits)
        count, odd = divmod(bits * size, 8)
        if size not in GROUP_SIZES or odd or not count:
            raise InvalidInputError(
                f"aqlm has no {bits}-bit scheme of 8-bit codes in groups of {size}",
                hint="Use groups of 8, or name a scheme such as 1x12.",
            )
        return AdditiveSpec(count, 8, size)

    def quantize(
        self,
        weight: torch.Tensor,
        spec: AdditiveSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
    ) -> dict[str, torch.Tensor]:
        """See `Method.quantize`: without calibration, every input counting the same."""
        if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise InvalidInputError(f"{name}: a finite floating-point matrix was expected")
        settings = layer_settings(self.validate(options))
        spec = _additive(spec, name)
        size = -(-weight.shape[1] // spec.group_size) * spec.group_size
        metric = Metric(torch.eye(size, device=weight.device), spec.group_size, settings.damping)
        return stored_tensors(spec, fit_layer(weight, metric, spec, settings, seed=0))

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """See `CalibratedMethod.quantize_block`."""
        options = self.validate(task.options)
        settings = layer_settings(options)
        clock = PhaseClock(task.device)
        fitted: dict[str, Fitted] = {}
        current: dict[str, torch.Tensor] = {}
        for stage in task.stages():
            with clock.phase("moments"):
                moments = task.moments(stage, current)
            metrics: dict[int, Metric] = {}
            for linear in stage:
                spec = _additive(task.specs[linear.name], linear.name)
                with clock.phase("metric"):
                    if spec.group_size not in metrics:
                        metrics[spec.group_size] = make_metric(moments, spec, settings.damping)
                    metric = metrics[spec.group_size]
                    weight = corrected_weight(task.weights[linear.weight], moments, metric)
                fitted[linear.name] = fit_layer(weight, metric, spec, settings, task.seed, clock)
                task.tell(f"{linear.name}: relative error {fitted[linear.name].error:.5f}")
            current.update({linear.weight: fitted[linear.name].weight() for linear in stage})
        layer_error = {name: layer.error for name, layer in fitted.items()}
        with clock.phase("tuning"):
            fitted, vectors, info = finetune(task, fitted, tuning_settings(options))
        phases = {name: round(seconds, 2) for name, seconds in clock.seconds.items()}
        task.tell(f"{task.name}: " + ", ".join(f"{name} {value:.1f} s" for name, value in phases.items()))
        tensors = {name: stored_tensors(task.specs[name], layer) for name, layer in fitted.items()}
        weights = {
            task.linears[name].weight: ADDITIVE.dequantize(
                task.specs[name], stored, task.linears[name].in_features, torch.float32
            )
            for name, stored in tensors.items()
        }
        figures = {"layer_error": layer_error, "phases": phases, **info}
        return BlockResult(tensors, dict(task.specs), {**weights, **vectors}, figures)

    def block_seconds(
        self,
        block: Block,
        specs: Mapping[str, Any],
        options: Mapping[str, Any],
        windows: int,
        context: int,
        device: torch.device,
    ) -> dict[str, float]:
        """See `CalibratedMethod.block_seconds`."""
        stages = [
            [
                (x.out_features, x.in_features, _additive(specs[x.name], x.name))
                for x in stage
                if x.name in specs
            ]
            for stage in block.stages()
        ]

        def rates(spec: AdditiveSpec) -> Rates:
            key = (spec, options["beam"], device)
            if key not in self._rates:
                self._rates[key] = measure_rates(*key)
            return self._rates[key]

        return block_seconds(
            stages, rates, layer_settings(options), tuning_settings(options), windows, context
        )


def layer_settings(options: Mapping[str, Any]) -> LayerSettings:
    """How a linear is fitted, from the method's options."""
    return LayerSettings(
        beam=options["beam"], rounds=options["rounds"], solver=options["solver"], damping=options["damping"]
    )


def tuning_settings(options: Mapping[str, Any]) -> FinetuneSettings:
    """How a block is tuned, from the method's options."""
    return FinetuneSettings(
        epochs=options["epochs"], rate=options["rate"], code_updates=options["code_updates"]
    )


def stored_tensors(spec: AdditiveSpec, layer: Fitted) -> dict[str, torch.Tensor]:
    """The tensors of the format; codewords are brought to a root mean square of 1 first."""
    size = layer.codebooks.square().mean().sqrt().clamp_min(1e-12)
    return ADDITIVE.pack(spec, layer.codes, layer.codebooks / size, layer.scales * size)


def _additive(spec: object, name: str) -> AdditiveSpec:
    if not isinstance(spec, AdditiveSpec):
        raise InvalidInputError(f"{name}: aqlm stores the additive format, not {spec!r}.")
    return spec
