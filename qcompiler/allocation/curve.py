"""The trade-off between size and loss: the best allocations over the range of sizes, and uniform choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompiler.allocation.problem import Problem
from qcompiler.kernels.errors import InvalidInputError

POINTS = 24
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Point:
    """One size on the curve.

    Attributes:
        label: "auto", or the candidate that all linears take.
        bits_per_weight: Of the quantized linears.
        predicted: What the measured sensitivities add up to.
    """

    label: str
    bits_per_weight: float
    predicted: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def curve(problem: Problem, points: int = POINTS) -> list[Point]:
    """Best allocations from the smallest to the largest size, then the uniform choices by size."""
    low, high = problem.smallest, problem.largest
    budgets = sorted({low + round((high - low) * step / (points - 1)) for step in range(points)})
    best = []
    for budget in budgets:
        chosen = problem.solve(budget)
        best.append(Point("auto", problem.bits_per_weight(problem.nbytes(chosen)), problem.cost(chosen)))
    uniform = [
        Point(label, problem.bits_per_weight(nbytes), cost) for label, nbytes, cost in problem.uniform()
    ]
    return [*dict.fromkeys(best), *uniform]


def check_plot(path: Path) -> None:
    """Refuse, before any work, a plot that cannot be drawn.

    Raises:
        InvalidInputError: The kind of file is unknown, its folder is missing, or matplotlib is.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InvalidInputError(
            f"a plot cannot be written as {path.name!r}", hint=f"Name it {' or '.join(PLOT_SUFFIXES)}."
        )
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path.parent} is not a folder", hint="Create it first.")
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidInputError(
            "a plot needs the package matplotlib", hint='Install it: pip install "qcompiler[auto]"'
        )


def draw(
    path: Path,
    points: Sequence[Point],
    chosen: Point,
    *,
    unit: str,
    measured: Mapping[float, float] | None = None,
) -> None:
    """Draw the curve.

    Args:
        path: Where to; the suffix tells the kind of file.
        points: What `curve` gave.
        chosen: The allocation that was taken.
        unit: Of the loss, for the axis.
        measured: Bits per weight → KL divergence measured over the evaluation text.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    line = [point for point in points if point.label == "auto"]
    axes.plot([p.bits_per_weight for p in line], [p.predicted for p in line], "-", label="auto, predicted")
    methods = sorted({p.label.split()[0] for p in points if p.label != "auto"})
    for method, marker in zip(methods, "ox^sv*dP" * len(methods), strict=False):
        own = [p for p in points if p.label.split()[0] == method]
        axes.plot(
            [p.bits_per_weight for p in own],
            [p.predicted for p in own],
            marker,
            fillstyle="none",
            label=f"uniform {method}, predicted",
        )
    axes.plot([chosen.bits_per_weight], [chosen.predicted], "k*", markersize=12, label="chosen, predicted")
    if measured:
        axes.plot(list(measured), list(measured.values()), "r+", markersize=12, label="measured")
    if all(point.predicted > 0 for point in points):
        axes.set_yscale("log")
    axes.set_xlabel("bits per weight in the quantized linears")
    axes.set_ylabel(unit)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
