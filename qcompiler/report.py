"""What a compilation reports: the machine-readable object and the block printed at its end."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.allocation.allocate import Allocation
    from qcompiler.quality import Quality


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear.

    Attributes:
        name: Fully qualified name of the linear.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        bits: Bits per code.
        bits_per_weight: Everything stored for it over the number of its weights.
        relative_error: |W - dequantized|² / |W|².
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    bits_per_weight: float
    relative_error: float


@dataclass(frozen=True)
class EmbeddingReport:
    """One quantized embedding table, and the linears that read the same stored tensors."""

    name: str
    bits_per_weight: float
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class SkippedLayer:
    """A linear left in the activation dtype, and why."""

    name: str
    reason: str


@dataclass
class CompileReport:
    """The object that `qcompile --json` prints; sizes in bytes, times in seconds."""

    output: str
    bytes: int
    bits_per_weight: float
    bits_per_weight_linears: float
    linears_quantized: int
    linears_skipped: list[SkippedLayer]
    seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int
    quality: Quality | None
    manifest_sha256: str
    linears_total: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    resumed_layers: int = 0
    embeddings: list[EmbeddingReport] = field(default_factory=list)
    kv_cache: str = "plain"
    emissions: dict[str, Any] = field(default_factory=dict)
    allocation: Allocation | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict with the documented keys."""
        return {
            **asdict(self),
            "emissions": {name: emission.to_json() for name, emission in self.emissions.items()},
            "allocation": self.allocation.to_json() if self.allocation else None,
        }

    def worst_layers(self, count: int = 5) -> list[LayerReport]:
        """The quantized linears of largest relative error."""
        return sorted(self.layers, key=lambda layer: -layer.relative_error)[:count]

    def print(self, console: Console) -> None:
        """Write the end-of-run block."""
        for label, text in self._lines():
            # One line per fact, never cut or padded to the width: it is read by eye and by grep.
            console.print(f"{label:<15}{text}", soft_wrap=True, highlight=False, markup=False)
        for emission in self.emissions.values():
            emission.print(console)

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "artifact", self.output
        yield (
            "size",
            f"{format_bytes(self.bytes)}, {self.bits_per_weight:.3f} bits per weight with embeddings, "
            f"{self.bits_per_weight_linears:.3f} in the quantized linears",
        )
        yield "linears", f"{self.linears_quantized}/{self.linears_total} quantized"
        for table in self.embeddings:
            shared = f", shared with {shorten(list(table.shared_with))}" if table.shared_with else ""
            yield "embedding", f"{table.name}: {table.bits_per_weight:.3f} bits per weight{shared}"
        for reason, names in by_reason(self.linears_skipped).items():
            yield "", f"{len(names)} skipped: {reason}: {shorten(names)}"
        if self.kv_cache != "plain":
            yield "KV cache", f"{self.kv_cache}; the figures of quality are with it"
        yield from self._allocation_lines()
        gpu = f", {format_bytes(self.peak_gpu_bytes)} GPU" if self.peak_gpu_bytes else ""
        yield "peak memory", f"{format_bytes(self.peak_rss_bytes)} RAM{gpu}"
        yield (
            "time",
            f"{self.seconds:.1f} s"
            + (f" ({self.resumed_layers} layers resumed)" if self.resumed_layers else ""),
        )
        yield from self._quality_lines()
        for index, layer in enumerate(self.worst_layers()):
            label = "" if index else "worst layers"
            yield label, f"{layer.name} ({layer.bits} bits): relative error {layer.relative_error:.2e}"
        yield "manifest", f"sha256 {self.manifest_sha256}"
        yield "try next", f'qrun generate {self.output} --prompt "Once upon a time"'
        yield "", f"qrun bench {self.output}"

    def _allocation_lines(self) -> Iterator[tuple[str, str]]:
        allocation = self.allocation
        if allocation is None:
            return
        yield "target", f"{allocation.target}: {allocation.bits_per_weight:.3f} bits per weight were chosen"
        for index, (label, count) in enumerate(allocation.counts.items()):
            yield "" if index else "formats", f"{label}: {count} groups of linears"
        yield "predicted", f"{allocation.predicted:.5f} ({allocation.unit})"

    def _quality_lines(self) -> Iterator[tuple[str, str]]:
        q = self.quality
        if q is None:
            yield "quality", "not measured"
            return
        yield "KL divergence", f"{q.kl_mean:.5f} ± {q.kl_se:.5f} nats per token over {q.tokens} tokens"
        yield "same top-1", f"{100 * q.top1_agreement:.2f} %"
        yield (
            "perplexity",
            f"{q.perplexity:.4f}, original {q.perplexity_original:.4f} (ratio {q.perplexity_ratio:.4f})",
        )


def by_reason(skipped: list[SkippedLayer]) -> dict[str, list[str]]:
    """Names of skipped linears by the reason why, in order of appearance."""
    grouped: dict[str, list[str]] = {}
    for layer in skipped:
        grouped.setdefault(layer.reason, []).append(layer.name)
    return grouped


def shorten(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f", {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def format_bytes(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.

    From VmHWM where there is a /proc: `ru_maxrss` outlives exec, and so also counts what a large
    program held that merely started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
