"""What each candidate costs each group of linears: on calibration text in KL divergence, or on weights alone.

Output-side, every linear of a block is quantized with every candidate and the error at its output is weighed
by the gradients of `fisher`. Weights of experts, which no single input reads, and everything where there is
no text get ½·‖W − Ŵ‖²/‖W‖² instead; beside measured costs the median ratio brings that to their scale.

Finished blocks are kept in a store, so that an interrupted run measures none twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qcompiler.allocation.candidates import Candidate, Group
from qcompiler.allocation.fisher import Observed, observe
from qcompiler.calibration.runner import CalibrationSettings, PartStore
from qcompiler.calibration.task import Moments
from qcompiler.kernels.formats import get_format
from qcompiler.methods.aqlm.layer import fit_layer, make_metric
from qcompiler.methods.aqlm.method import AQLM, layer_settings
from qcompiler.methods.base import get_method
from qcompiler.methods.gptq import feedback_codes
from qcompiler.passes import QuantizedLinear
from qcompiler.passes.quantized_weights import expert_matrices
from qcompiler.passes.weights import recipe_of, resolve
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress

# group name -> candidate label -> cost
Costs = dict[str, dict[str, float]]
OBSERVED_TOKENS = 8192
# Rows of a weight that are quantized for its cost, where rows are quantized each on its own.
_ROWS = 256
_PREFIX = "auto:cost:"


def measure(
    plan: CompilePlan,
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    tokens: Tensor | None,
    store: PartStore,
    progress: Progress,
) -> Costs:
    """The cost of each candidate for each group; candidates that a group's shapes rule out are left out.

    Args:
        plan: The plan, whose weights are read one block at a time.
        groups: What is to be decided.
        candidates: The choices.
        tokens: Calibration text, int64 [tokens]; None: look at weights alone.
        store: Keeps what was measured.
        progress: Told of each block.

    Returns:
        KL in nats per token with text, half the relative squared error without.
    """
    layers = {layer.name: layer for group in groups for layer in group.layers}
    on_text = {} if tokens is None else _on_text(plan, layers, candidates, tokens, store, progress)
    rest = [layer for name, layer in layers.items() if name not in on_text]
    on_weights = _on_weights(plan, rest, candidates, store, progress) if rest else {}
    scale = 1.0
    if on_text and on_weights:
        sample = list(on_text)[:: max(1, len(on_text) // 8)]
        reference = _on_weights(plan, [layers[name] for name in sample], candidates, store, progress)
        ratios = [
            on_text[name][label] / error
            for name in sample
            for label, error in reference[name].items()
            if error > 0 and label in on_text[name]
        ]
        scale = median(ratios) if ratios else 1.0
    costs: Costs = {}
    for group in groups:
        costs[group.name] = {}
        for candidate in candidates:
            found = [
                on_text[layer.name].get(candidate.label)
                if layer.name in on_text
                else _scaled(on_weights[layer.name].get(candidate.label), scale)
                for layer in group.layers
            ]
            known = [cost for cost in found if cost is not None]
            if len(known) == len(found):
                costs[group.name][candidate.label] = sum(known)
    return costs


def _scaled(cost: float | None, scale: float) -> float | None:
    return None if cost is None else cost * scale


def _on_text(
    plan: CompilePlan,
    layers: Mapping[str, QuantizedLinear],
    candidates: Sequence[Candidate],
    tokens: Tensor,
    store: PartStore,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    options = plan.options
    context = min(options.eval_context, plan.captured.max_positions or options.eval_context)
    settings = CalibrationSettings(context=context, tokens=min(options.calib_tokens, OBSERVED_TOKENS))
    windows = settings.windows(tokens.tolist())
    wanted = frozenset(name for name, layer in layers.items() if layer.kind == "linear")
    found: dict[str, dict[str, float]] = {}

    with progress.stage("sensitivity", len(wanted)) as advance:
        seen = observe(plan.captured.graph, plan.checkpoint.tensor, windows, wanted, device=plan.device)
        for block, linears in seen:
            held = store.finished(_PREFIX + block)
            if held is None:
                held = {}
                for observed, moments in _with_moments(linears):
                    layer = layers[observed.linear.name]
                    held[layer.name] = _costs_of(layer, candidates, _on_inputs(observed, moments))
                    advance(layer.name)
                store.store(_PREFIX + block, {}, held)
            found.update(held)
    return found


def _with_moments(linears: Sequence[Observed]) -> list[tuple[Observed, Moments]]:
    """Each linear with the second moments of its input, made once for those that share one."""
    shared: dict[Any, Moments] = {}
    for observed in linears:
        x = observed.inputs
        if observed.linear.input not in shared:
            shared[observed.linear.input] = Moments(x.T @ x / x.shape[0], None, x.shape[0])
    return [(observed, shared[observed.linear.input]) for observed in linears]


def _costs_of(
    layer: QuantizedLinear, candidates: Sequence[Candidate], cost: Callable[[Candidate], float]
) -> dict[str, float]:
    return {candidate.label: cost(candidate) for candidate in candidates if candidate.takes(layer)}


def _on_inputs(observed: Observed, moments: Moments) -> Callable[[Candidate], float]:
    some = observed.rows(_ROWS)

    def cost(candidate: Candidate) -> float:
        # The fewer rows share a codebook, the better it fits them: those see all rows.
        seen = observed if candidate.method == "aqlm" else some
        return seen.cost(restored(candidate, seen.weight, moments))

    return cost


@torch.no_grad()
def restored(candidate: Candidate, weight: Tensor, moments: Moments | None) -> Tensor:
    """The weight [N, K] that a candidate's codes stand for, fitted to the input's moments where it can be."""
    format_ = get_format(candidate.spec.name)
    options = dict(candidate.options)
    if moments is not None and candidate.method == "gptq":
        solution = feedback_codes(weight, moments, candidate.spec, options["damping"])
        tensors = format_.pack(candidate.spec, *solution)  # type: ignore[attr-defined]
    elif moments is not None and candidate.method == "aqlm":
        settings = replace(layer_settings(AQLM().validate(options)), rounds=1)  # more gain little
        metric = make_metric(moments, candidate.spec, settings.damping)
        return fit_layer(weight, metric, candidate.spec, settings, seed=0).weight()
    else:
        tensors = get_method(candidate.method).quantize(weight, candidate.spec, options)
    weight_: Tensor = format_.dequantize(candidate.spec, tensors, weight.shape[1], torch.float32)
    return weight_


def _on_weights(
    plan: CompilePlan,
    layers: Sequence[QuantizedLinear],
    candidates: Sequence[Candidate],
    store: PartStore,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """½·‖W − Ŵ‖²/‖W‖² by layer and candidate."""
    found = {}
    with progress.stage("sensitivity of weights", len(layers)) as advance:
        for layer in layers:
            key = f"{_PREFIX}weights:{layer.name}"
            held = store.finished(key)
            if held is None:
                recipe = recipe_of(plan.captured.graph, layer.weight)
                weight = resolve(recipe, plan.checkpoint.tensor)
                matrices = [weight]
                if layer.kind == "experts":
                    matrices = expert_matrices(weight, transposed=layer.transposed)
                held = _costs_of(layer, candidates, _relative_error(matrices, plan.device))
                store.store(key, {}, held)
            found[layer.name] = held
            advance(layer.name)
    return found


def _relative_error(matrices: Sequence[Tensor], device: torch.device) -> Callable[[Candidate], float]:
    def cost(candidate: Candidate) -> float:
        error = total = 0.0
        for matrix in matrices:
            moved = matrix.to(device).float().contiguous()
            difference = restored(candidate, moved, None) - moved
            error += float(difference.square().sum(dtype=torch.float64))
            total += float(moved.square().sum(dtype=torch.float64))
        return 0.5 * error / total if total else 0.0

    return cost
