"""What can be said of an allocation before a weight is read: for `--dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qcompiler.allocation.allocate import MOST_TRIALS, checked_budget, target_text
from qcompiler.allocation.candidates import groups_of, pool
from qcompiler.allocation.problem import Problem
from qcompiler.plan import CompilePlan, plan_layers


@dataclass(frozen=True)
class Preview:
    """The choices and their range.

    Attributes:
        target: In words.
        groups: How many groups of linears are decided.
        candidates: Labels of the formats on offer, by size.
        smallest_bits_per_weight: Of the quantized linears, every group at its smallest.
        largest_bits_per_weight: Every group at its largest.
        uniform: The uniform choice that all other figures of the estimate are those of: the largest that a
            size target leaves room for (the smallest mixture may be smaller), the largest of all for a KL
            target.
        trials: Allocations that may be quantized before one is taken.
    """

    target: str
    groups: int
    candidates: list[str]
    smallest_bits_per_weight: float
    largest_bits_per_weight: float
    uniform: str
    trials: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For the console."""
        bits = f"{self.smallest_bits_per_weight:.3f} to {self.largest_bits_per_weight:.3f} bits per weight"
        return [
            f"target           {self.target}",
            f"choices          {len(self.candidates)} formats for {self.groups} groups of linears, {bits}",
            f"                 {', '.join(self.candidates)}",
            f"                 chosen after measuring; the figures here are those of uniform {self.uniform}",
        ]


def preview(plan: CompilePlan) -> tuple[CompilePlan, Preview]:
    """The plan with a uniform choice that bounds the size, and what is known of the allocation.

    Raises:
        InvalidInputError: The target is below the smallest choices.
    """
    candidates = pool(plan.options, calibrated=plan.options.sensitivity == "output")
    groups = groups_of(plan)
    unknown = {
        group.name: {c.label: 0.0 for c in candidates if all(map(c.takes, group.layers))} for group in groups
    }
    problem = Problem(plan, groups, candidates, unknown)
    uniform = problem.uniform()
    fitting = uniform
    if plan.options.target_kl is None:
        budget = checked_budget(plan, problem)
        fitting = [item for item in uniform if item[1] <= budget] or uniform[:1]
    label = max(fitting, key=lambda item: item[1])[0]
    spec = problem.candidates[label].spec
    formats = {layer.name: spec for group in groups for layer in group.layers}
    largest = sum(
        max(group.nbytes(problem.candidates[name]) for name in unknown[group.name]) for group in groups
    )
    return plan_layers(plan, formats), Preview(
        target_text(plan),
        len(groups),
        list(problem.candidates),
        problem.bits_per_weight(problem.smallest),
        problem.bits_per_weight(largest),
        label,
        1 if plan.options.target_kl is None else MOST_TRIALS,
    )
