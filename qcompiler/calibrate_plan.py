"""Runs a calibrated method over the blocks of a plan, block by block, kept in the workspace."""

from __future__ import annotations

from typing import Any, cast

import torch

from qcompiler.calibration import Calibration, CalibrationSettings, calibrate
from qcompiler.calibration.runner import PartStore
from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.passes.weights import recipe_of, resolve
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.texts import text_tokens


def calibration_windows(plan: CompilePlan) -> tuple[int, int]:
    """How many windows of the calibration text are used at most, and their tokens."""
    options = plan.options
    context = min(options.eval_context, plan.captured.max_positions or options.eval_context)
    return max(1, options.calib_tokens // context), context


def calibrate_plan(plan: CompilePlan, workspace: PartStore, progress: Progress) -> Calibration:
    """Quantize the planned linears that lie in blocks; finished blocks of the workspace are kept.

    Raises:
        InvalidInputError: The checkpoint has no tokenizer, or the calibration text is too short.
        UnsupportedModelError: The graph cannot be cut into blocks.
    """
    options = plan.options
    _, context = calibration_windows(plan)
    if options.calib_tokens < context:
        raise InvalidInputError(
            f"calib_tokens is {options.calib_tokens}, less than one window of {context}",
            hint="Raise --calib-tokens.",
        )
    # The runner spreads its windows over the text, so it is given more than it will use.
    tokens = text_tokens(plan, options.calib_text, "calib", 4 * options.calib_tokens)
    if tokens is None:
        raise InvalidInputError(
            f"method {plan.method.name} needs calibration text, but the checkpoint has no tokenizer.json",
            hint="Add the tokenizer, or use a method without calibration (hqq).",
        )
    planned = {layer.name: layer.spec for layer in plan.layers}

    def choose(name: str, _out_features: int, _in_features: int) -> Any:
        return planned.get(name, "left alone by the plan")

    def load(name: str) -> torch.Tensor:
        return resolve(recipe_of(plan.captured.graph, name), plan.checkpoint.tensor)

    outcome = calibrate(
        plan.captured.graph,
        load,
        tokens.tolist(),
        cast("CalibratedMethod", plan.method),
        choose,
        CalibrationSettings(context=context, tokens=options.calib_tokens),
        options=plan.method_options,
        store=workspace,
        progress=progress,
        device=plan.device,
    )
    for name, spec in outcome.specs.items():
        if spec != planned[name]:
            raise QCompilerError(f"{name}: calibration stored {spec}, but {planned[name]} was planned")
    return outcome
