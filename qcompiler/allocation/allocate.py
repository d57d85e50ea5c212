"""Chooses a format for every linear, so that a target is met at the least loss, and quantizes accordingly.

Sensitivities, allocations and the layers of every allocation that is tried are kept in the workspace: an
interrupted run goes on where it stood, and ends with the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qcompiler.allocation.candidates import groups_of, pool
from qcompiler.allocation.curve import Point, curve
from qcompiler.allocation.problem import Problem
from qcompiler.allocation.sensitivity import OBSERVED_TOKENS, measure
from qcompiler.allocation.store import PrefixedStore
from qcompiler.calibration.runner import PartStore
from qcompiler.kernels.errors import InvalidInputError, QualityGateError
from qcompiler.kernels.formats import get_format
from qcompiler.plan import CompilePlan, plan_layers
from qcompiler.progress import Progress
from qcompiler.quality import Quality
from qcompiler.sizes import Sizes
from qcompiler.texts import text_tokens

# An allocation tried for a KL target is taken when a smaller one is known to fail that is this near in size.
_NEAR = 0.01
MOST_TRIALS = 8
# Graph, manifest and report beside the weights and carried files; seen at about 1.5 kB for each linear.
_OVERHEAD_BYTES = 8192
_OVERHEAD_BYTES_PER_LAYER = 2560


@dataclass
class Allocation:
    """What was chosen, and why.

    Attributes:
        target: What was asked for, e.g. "3 bits per weight".
        sensitivity: "output" or "weights".
        choices: Group's first linear → label of what all of it became.
        bits_per_weight: Of the quantized linears.
        predicted: What the sensitivities of the choices add up to: KL divergence in nats per token on
            text, half the relative squared error of the weights without.
        points: The trade-off: best allocations, and uniform choices.
        trials: Allocations measured for a KL target: bits per weight, predicted, KL measured.
    """

    target: str
    sensitivity: str
    choices: dict[str, str]
    bits_per_weight: float
    predicted: float
    points: list[Point] = field(default_factory=list)
    trials: list[dict[str, float]] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Of `predicted`."""
        return "KL, nats per token" if self.sensitivity == "output" else "½ · relative squared error, summed"

    @property
    def counts(self) -> dict[str, int]:
        """Label → how many groups became it, most first."""
        return dict(Counter(self.choices.values()).most_common())

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "target": self.target,
            "sensitivity": self.sensitivity,
            "choices": self.choices,
            "bits_per_weight": self.bits_per_weight,
            "predicted": self.predicted,
            "trials": self.trials,
            "curve": [point.to_json() for point in self.points],
        }


@dataclass
class Trial:
    """An allocation as quantized.

    Attributes:
        plan: With the formats of the allocation.
        allocation: The allocation.
        done: What the quantization of the plan gave.
        quality: Its quality, if it was measured.
    """

    plan: CompilePlan
    allocation: Allocation
    done: Any
    quality: Quality | None


# (plan, where its layers are kept) → (the quantized layers, their measured quality)
Quantize = Callable[[CompilePlan, PartStore], tuple[Any, Quality | None]]


def allocate(plan: CompilePlan, store: PartStore, progress: Progress, quantize: Quantize) -> Trial:
    """Meet the target of `plan.options`.

    Raises:
        InvalidInputError: The target cannot be met, or there is no text where one is needed.
        QualityGateError: Not even the best allocation meets a KL target.
    """
    problem = find_problem(plan, store, progress)
    search = _Search(plan, problem, store, quantize)
    if plan.options.target_kl is not None:
        return search.for_kl(plan.options.target_kl, progress)
    chosen = problem.solve(checked_budget(plan, problem))
    return search.trial(chosen, "")


def find_problem(plan: CompilePlan, store: PartStore, progress: Progress) -> Problem:
    """The groups, candidates and measured costs of a plan."""
    options = plan.options
    tokens = _calibration_tokens(plan) if options.sensitivity == "output" else None
    candidates = pool(options, calibrated=tokens is not None)
    groups = groups_of(plan)
    if not groups:
        raise InvalidInputError("the format of every linear is fixed: a target has nothing to choose")
    return Problem(plan, groups, candidates, measure(plan, groups, candidates, tokens, store, progress))


def budget_of(plan: CompilePlan, problem: Problem) -> int:
    """Bytes that a size target leaves for the linears whose format is open."""
    options = plan.options
    if options.target_bpw is not None:
        return problem.budget_of_bits(options.target_bpw)
    if options.target_bytes is None:
        raise InvalidInputError("there is no size target")
    return options.target_bytes - rest_of_artifact(plan, problem)


def rest_of_artifact(plan: CompilePlan, problem: Problem) -> int:
    """Bytes of everything in the artifact but the linears whose format is open."""
    stored = sum(
        get_format(layer.format).nbytes(layer.spec, layer.out_features, layer.in_features)
        for group in problem.groups
        for layer in group.layers
    )
    carried = sum(path.stat().st_size for path in plan.carried_files().values())
    others = _OVERHEAD_BYTES + _OVERHEAD_BYTES_PER_LAYER * len(plan.layers)
    return Sizes(plan).bytes - stored + carried + others


def target_text(plan: CompilePlan) -> str:
    """The target in words."""
    options = plan.options
    if options.target_bpw is not None:
        return f"{options.target_bpw:g} bits per weight"
    if options.target_bytes is not None:
        return f"{options.target_bytes} bytes"
    return f"KL divergence {options.target_kl:g}"


def checked_budget(plan: CompilePlan, problem: Problem) -> int:
    """Like `budget_of`, and refused where the smallest choices do not fit.

    Raises:
        InvalidInputError: They do not.
    """
    budget = budget_of(plan, problem)
    if budget < problem.smallest:
        least = f"{problem.bits_per_weight(problem.smallest):.3f} bits per weight"
        if plan.options.target_bytes is not None:
            least = f"{problem.smallest + rest_of_artifact(plan, problem)} bytes"
        raise InvalidInputError(
            f"{target_text(plan)} cannot be met: the smallest choices take {least}",
            hint="Raise the target, or allow smaller choices (--method auto, --embedding-bits 4).",
        )
    return budget


def _calibration_tokens(plan: CompilePlan) -> Tensor:
    if plan.captured.kind != "decoder":
        raise InvalidInputError(
            "sensitivities on text need a decoder", hint="Use --sensitivity weights, which needs no text."
        )
    tokens = text_tokens(
        plan, plan.options.calib_text, "calib", 4 * min(plan.options.calib_tokens, OBSERVED_TOKENS)
    )
    if tokens is None:
        raise InvalidInputError(
            "a target needs calibration text, but the checkpoint has no tokenizer.json",
            hint="Add the tokenizer, or use --sensitivity weights.",
        )
    return tokens


class _Search:
    """Allocations of a problem, quantized one after the other."""

    def __init__(self, plan: CompilePlan, problem: Problem, store: PartStore, quantize: Quantize):
        self._plan = plan
        self._problem = problem
        self._store = store
        self._quantize = quantize
        self._points = curve(problem)

    def trial(self, chosen: list[int], name: str) -> Trial:
        """Quantize with an allocation; its layers are kept under `name`."""
        problem = self._problem
        chosen = self._stored(chosen, name)
        plan = plan_layers(self._plan, problem.specs(chosen))
        nbytes = problem.nbytes(chosen)
        allocation = Allocation(
            target_text(plan),
            plan.options.sensitivity,
            problem.labels(chosen),
            problem.bits_per_weight(nbytes),
            problem.cost(chosen),
            self._points,
        )
        done, quality = self._quantize(plan, PrefixedStore(self._store, f"{name}:") if name else self._store)
        return Trial(plan, allocation, done, quality)

    def for_kl(self, target: float, progress: Progress) -> Trial:
        """The smallest allocation found whose measured KL divergence is at most `target`."""
        problem = self._problem
        low, high = problem.smallest - 1, problem.largest  # low: known to fail, or nothing there
        best: Trial | None = None
        trials: list[dict[str, float]] = []
        factor, tried_largest = 1.0, False
        for number in range(MOST_TRIALS):
            budget = problem.budget_of_cost(target / factor)
            if best is not None and not low < budget < high:
                budget = (low + high) // 2
            if best is None and number == MOST_TRIALS - 2:
                budget = high
            budget = min(max(budget, low + 1), high)
            tried_largest = budget == problem.largest
            trial = self.trial(problem.solve(budget), f"auto:trial{number}")
            if trial.quality is None:
                raise QualityGateError(
                    "--target-kl was given, but the quality of this model could not be measured",
                    hint="The checkpoint needs a tokenizer.json, and the model must be a decoder.",
                )
            kl = trial.quality.kl_mean
            trials.append(
                {
                    "bits_per_weight": trial.allocation.bits_per_weight,
                    "predicted": trial.allocation.predicted,
                    "kl": kl,
                }
            )
            progress.note(f"{trial.allocation.bits_per_weight:.3f} bits per weight: KL divergence {kl:.5f}")
            if kl <= target:
                best, high = trial, budget
            else:
                low = budget
                if tried_largest:
                    break
            factor = max(kl, 1e-9) / max(trial.allocation.predicted, 1e-9)
            if best is not None and high - low <= _NEAR * high:
                break
        if best is None:
            raise QualityGateError(
                f"no allocation was found with a KL divergence of at most {target:g}; the largest tried has "
                f"{min(item['kl'] for item in trials):.4g}",
                hint="Raise --target-kl, or leave the method open (--method auto).",
            )
        best.allocation.trials = trials
        return best

    def _stored(self, chosen: list[int], name: str) -> list[int]:
        """The allocation as the store holds it, so that a resumed run cannot choose another."""
        key = f"{name or 'auto'}:allocation"
        held = self._store.finished(key)
        if held is None:
            held = {"chosen": chosen}
            self._store.store(key, {}, held)
        return list(held["chosen"])
