"""The multiple-choice knapsack: one choice per group, least total cost within a budget; solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompiler.kernels.errors import InvalidInputError, QCompilerError


@dataclass(frozen=True)
class Choice:
    """One way to store one group.

    Attributes:
        nbytes: Stored bytes.
        cost: Loss that it adds, 0 or more.
    """

    nbytes: int
    cost: float


def solve(groups: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Index of the choice for each group, of least total cost among those that fit.

    Args:
        groups: The choices of each group, at least one each.
        budget: Bytes for all together.

    Returns:
        An optimum; of equal ones always the same on one version of the solver.

    Raises:
        InvalidInputError: Not even the smallest choices fit, or scipy is not installed.
    """
    smallest = sum(min(choice.nbytes for choice in choices) for choices in groups)
    if smallest > budget:
        raise InvalidInputError(
            f"the smallest choices take {smallest} bytes, {budget} are allowed",
            hint="Raise the target, or leave the method open (--method auto).",
        )
    kept = [pareto(choices) for choices in groups]
    if sum(choices[front[-1]].nbytes for choices, front in zip(groups, kept, strict=True)) <= budget:
        return [front[-1] for front in kept]  # the best of each fits
    return _milp(groups, kept, budget)


def pareto(choices: Sequence[Choice]) -> list[int]:
    """Indices of the choices than which none is both smaller and better, by rising size and falling cost."""
    front: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].nbytes, choices[i].cost, i)):
        if not front or choices[index].cost < choices[front[-1]].cost:
            front.append(index)
    return front


def _milp(groups: Sequence[Sequence[Choice]], kept: Sequence[list[int]], budget: int) -> list[int]:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"a target needs the package {error.name}", hint='Install it: pip install "qcompiler[auto]"'
        ) from error
    flat = [(g, index) for g, front in enumerate(kept) for index in front]
    cost = np.array([groups[g][index].cost for g, index in flat])
    # Sizes above each group's smallest, and costs of order one: the solver's tolerances are absolute.
    base = [groups[g][front[0]].nbytes for g, front in enumerate(kept)]
    size = np.array([groups[g][index].nbytes - base[g] for g, index in flat], dtype=float)
    room = float(budget - sum(base))
    unit = max(1.0, float(size.max()))
    rows = np.array([g for g, _ in flat])
    one_each = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(kept), len(flat)))
    result = milp(
        cost * (len(kept) / max(float(cost.sum()), 1e-300)),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size[None] / unit, -np.inf, room / unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise QCompilerError(f"the solver gave no allocation: {result.message}")
    chosen: list[int] = [-1] * len(kept)
    best = [-1.0] * len(kept)
    for (g, index), value in zip(flat, result.x, strict=True):
        if value > best[g]:
            chosen[g], best[g] = index, float(value)
    return _within(groups, kept, chosen, budget)


def _within(
    groups: Sequence[Sequence[Choice]], kept: Sequence[list[int]], chosen: list[int], budget: int
) -> list[int]:
    """Take back what the solver's tolerance let through: too large by parts in a million."""
    while sum(groups[g][index].nbytes for g, index in enumerate(chosen)) > budget:
        steps = []
        for g, front in enumerate(kept):
            at = front.index(chosen[g])
            if at > 0:
                smaller = front[at - 1]
                steps.append((groups[g][smaller].cost - groups[g][chosen[g]].cost, g, smaller))
        _, g, index = min(steps)
        chosen[g] = index
    return chosen
