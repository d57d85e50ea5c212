"""The allocation as a problem: groups, candidates, their sizes and costs, and what stands fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.allocation.candidates import Candidate, Group
from qcompiler.allocation.sensitivity import Costs
from qcompiler.allocation.solve import Choice, solve
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.plan import CompilePlan


class Problem:
    """Costs and sizes of every choice.

    Args:
        plan: The plan, whose linears of fixed format count in bits per weight too.
        groups: What is to be decided.
        candidates: The choices.
        costs: Group → candidate's label → cost; a candidate missing there does not fit the group.

    Raises:
        InvalidInputError: A group has no candidate that fits it.
    """

    def __init__(
        self, plan: CompilePlan, groups: Sequence[Group], candidates: Sequence[Candidate], costs: Costs
    ):
        self.groups = list(groups)
        self.candidates = {candidate.label: candidate for candidate in candidates}
        self._labels = [
            [c.label for c in candidates if c.label in costs[group.name]] for group in self.groups
        ]
        for group, labels in zip(self.groups, self._labels, strict=True):
            if not labels:
                raise InvalidInputError(
                    f"{group.name}: none of the formats on offer takes its shape", hint="Skip it (--skip)."
                )
        self._choices = [
            [Choice(group.nbytes(self.candidates[label]), costs[group.name][label]) for label in labels]
            for group, labels in zip(self.groups, self._labels, strict=True)
        ]
        open_ = {layer.name for group in self.groups for layer in group.layers}
        self.weights = sum(layer.out_features * layer.in_features for layer in plan.linears)
        self.fixed_bytes = sum(
            get_format(layer.format).nbytes(layer.spec, layer.out_features, layer.in_features)
            for layer in plan.linears
            if layer.name not in open_
        )

    @property
    def smallest(self) -> int:
        """Bytes of the smallest allocation."""
        return sum(min(choice.nbytes for choice in choices) for choices in self._choices)

    @property
    def largest(self) -> int:
        """Bytes of the best allocation, past which more room is of no use."""
        return self.nbytes(self.solve(sum(max(c.nbytes for c in choices) for choices in self._choices)))

    def solve(self, budget: int) -> list[int]:
        """The best allocation within a budget of bytes: a choice for each group."""
        return solve(self._choices, budget)

    def nbytes(self, chosen: Sequence[int]) -> int:
        """Bytes of an allocation."""
        return sum(choices[i].nbytes for choices, i in zip(self._choices, chosen, strict=True))

    def cost(self, chosen: Sequence[int]) -> float:
        """Its cost."""
        return sum(choices[i].cost for choices, i in zip(self._choices, chosen, strict=True))

    def bits_per_weight(self, nbytes: int) -> float:
        """Bits per weight of the quantized linears, those of fixed format included."""
        return 8 * (nbytes + self.fixed_bytes) / self.weights

    def budget_of_bits(self, bits_per_weight: float) -> int:
        """Bytes that a number of bits per weight leaves for what is to be decided."""
        return int(bits_per_weight * self.weights / 8) - self.fixed_bytes

    def budget_of_cost(self, cost: float) -> int:
        """The smallest budget, to a part in a thousand, whose best allocation costs no more than that."""
        low, high = self.smallest, self.largest
        if self.cost(self.solve(low)) <= cost:
            return low
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            if self.cost(self.solve(middle)) <= cost:
                high = middle
            else:
                low = middle
        return high

    def labels(self, chosen: Sequence[int]) -> dict[str, str]:
        """Group → label of its choice."""
        return {
            group.name: labels[i] for group, labels, i in zip(self.groups, self._labels, chosen, strict=True)
        }

    def specs(self, chosen: Sequence[int]) -> dict[str, Any]:
        """Layer → the spec that an allocation gives it."""
        labels = self.labels(chosen)
        return {
            layer.name: self.candidates[labels[group.name]].spec
            for group in self.groups
            for layer in group.layers
        }

    def uniform(self) -> list[tuple[str, int, float]]:
        """(label, bytes, cost) of every candidate that fits all groups, by size."""
        found = []
        for label in self.candidates:
            if all(label in labels for labels in self._labels):
                chosen = [labels.index(label) for labels in self._labels]
                found.append((label, self.nbytes(chosen), self.cost(chosen)))
        return sorted(found, key=lambda item: (item[1], item[0]))
