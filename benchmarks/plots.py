"""The plots of docs/speed.md, drawn from benchmarks/results by `python -m benchmarks.tables`.

An SVG carries a digest of what it shows, by which a stale one is known without drawing it again: other
versions of matplotlib draw the same figures in other bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1  # of the way plots are drawn

# Columns of linear results that are no peer's.
_OURS = ("bf16_us", "read_ceiling_us")

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        name: Of its file.
        title: Above it.
        x: Label of the axis.
        y: Label of the axis.
        series: Points (x, y) of each line by its name.
        reference: y of a thin line: what is equal to the thing compared with.
        scatter: Points alone, no lines between them.
        log_y: Logarithmic both ways; x always is.
        dashed: Series of other people's.
    """

    name: str
    title: str
    x: str
    y: str
    series: Series
    reference: float | None = None
    scatter: bool = False
    log_y: bool = False
    dashed: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of everything that is drawn."""
        return hashlib.sha256(json.dumps([VERSION, *vars(self).values()]).encode()).hexdigest()

    def draw(self, path: Path) -> None:
        """Write the SVG."""
        import matplotlib as mpl

        mpl.use("svg")
        from matplotlib import pyplot as plt

        with mpl.rc_context({"svg.hashsalt": "qcompiler", "svg.fonttype": "none", "font.size": 9}):
            figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
            for index, (label, points) in enumerate(self.series.items()):
                style: dict[str, Any] = {"color": f"C{index % 10}", "marker": "osD^v<>P*X"[index % 10]}
                style |= {
                    "linestyle": "" if self.scatter else ("--" if label in self.dashed else "-"),
                    "markersize": 4,
                }
                axes.plot(*zip(*sorted(points), strict=True), label=label, **style)
            axes.set_xscale("log", base=2 if not self.scatter else 10)
            if self.log_y:
                axes.set_yscale("log")
            if not self.scatter:
                ticks = sorted({x for points in self.series.values() for x, _ in points})
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            if self.reference is not None:
                axes.axhline(self.reference, color="0.5", linewidth=0.8)
            axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7, ncols=2)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="svg", metadata={"Date": None, "Description": self.digest})
            plt.close(figure)


def speedups(stem: str, result: dict[str, Any]) -> list[Plot]:
    """Speed-up over bf16 against tokens, one plot per format of which several numbers were measured."""
    plots = []
    for case in dict.fromkeys(row["case"] for row in result["rows"]):
        series: Series = {}
        rows = [row for row in result["rows"] if row["case"] == case]
        largest = max(row["n"] * row["k"] for row in rows)
        for row in rows:
            shape = f"{row['n']}x{row['k']}"
            series.setdefault(shape, []).append((row["tokens"], row["bf16_us"] / row["us"]))
        for row in rows:
            peers = [key for key in row if key.endswith("_us") and key not in _OURS]
            for key in peers if row["n"] * row["k"] == largest else ():
                label = f"{key.removesuffix('_us').replace('_', ' ')}, {row['n']}x{row['k']}"
                series.setdefault(label, []).append((row["tokens"], row["bf16_us"] / row[key]))
        series = {label: points for label, points in series.items() if len(points) > 2}
        theirs = tuple(label for label in series if ", " in label)
        if series:
            title = f"{case} over bf16 cuBLAS, {gpu_of(result)}"
            plots.append(
                Plot(f"{stem}-{case}-speedup", title, "tokens", "times as fast", series, 1.0, dashed=theirs)
            )
    return plots


def bandwidths(stem: str, result: dict[str, Any]) -> list[Plot]:
    """Bytes of weights read per second at one token, against bytes, with the read ceiling."""
    series: Series = {}
    for row in result["rows"]:
        if row["tokens"] == 1 and "read_ceiling_us" in row:
            size = row["megabytes"]
            series.setdefault(row["case"], []).append((size, size / row["us"]))
            series.setdefault("plain read", []).append((size, size / row["read_ceiling_us"]))
    if not series:
        return []
    ordered = {"plain read": series.pop("plain read"), **series}
    title = f"Weights read at one token, {gpu_of(result)}"
    return [Plot(f"{stem}-bandwidth", title, "MB of weights", "TB/s", ordered, scatter=True)]


def decode_speeds(stem: str, result: dict[str, Any]) -> list[Plot]:
    """Decoded tokens per second against the number of sequences, one plot per shape."""
    plots = []
    for shape in dict.fromkeys(row_shape(row) for row in result["rows"]):
        series: Series = {
            row["label"]: [(int(b), r["tokens_per_second"]) for b, r in row["decode"].items()]
            for row in result["rows"]
            if row_shape(row) == shape and row.get("decode")
        }
        peers = tuple(row["label"] for row in result["rows"] if row["peer"] and row["label"] in series)
        title = f"Decode, {shape}, {gpu_of(result)}"
        name = f"{stem}-{shape.replace(', ', '-').replace(' ', '-')}-decode"
        if series:
            plots.append(
                Plot(name, title, "sequences", "tokens per second", series, log_y=True, dashed=peers)
            )
    return plots


PLOTS: dict[str, tuple[Callable[[str, dict[str, Any]], list[Plot]], ...]] = {
    "linear": (speedups, bandwidths),
    "model": (decode_speeds,),
}


def row_shape(row: dict[str, Any]) -> str:
    """Shape of a row of whole models, as plots and tables tell them apart."""
    from benchmarks.checkpoint import SHAPES

    full = row["layers"] == SHAPES[row["shape"]]["num_hidden_layers"]
    return row["shape"] if full else f"{row['shape']}, {row['layers']} layers"


def gpu_of(result: dict[str, Any]) -> str:
    """The device of a result file."""
    return str((result["machine"] if "machine" in result else result["runs"][-1])["gpu"])


def plots_of(kind: str, stem: str, result: dict[str, Any]) -> list[Plot]:
    """All plots of a result file."""
    return [plot for make in PLOTS.get(kind, ()) for plot in make(stem, result)]


def is_current(plot: Plot, folder: Path) -> bool:
    """Whether the picture in the folder shows just this."""
    path = folder / f"{plot.name}.svg"
    return path.is_file() and plot.digest in path.read_text(encoding="utf-8")
