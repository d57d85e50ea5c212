"""What a compilation reports: the machine-readable object and the block printed at its end."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

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

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict with the documented keys."""
        return asdict(self)

    def worst_layers(self, count: int = 5) -> list[LayerReport]:
        """The quantized linears of largest relative error."""
        return sorted(self.layers, key=lambda layer: -layer.relative_error)[:count]

    def print(self, console: Console) -> None:
        """Write the end-of-run block."""
        from rich.markup import escape
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("artifact", escape(self.output))
        table.add_row(
            "size",
            f"{format_bytes(self.bytes)}, {self.bits_per_weight:.3f} bits per weight"
            f" ({self.bits_per_weight_linears:.3f} in the quantized linears)",
        )
        table.add_row("linears", f"{self.linears_quantized}/{self.linears_total} quantized")
        for reason, names in self._skipped_by_reason().items():
            table.add_row("", escape(f"skipped {len(names)}: {reason} ({shorten(names)})"))
        memory = f"{format_bytes(self.peak_rss_bytes)} RAM"
        if self.peak_gpu_bytes:
            memory += f", {format_bytes(self.peak_gpu_bytes)} GPU"
        table.add_row("peak memory", memory)
        resumed = f" ({self.resumed_layers} layers resumed)" if self.resumed_layers else ""
        table.add_row("time", f"{self.seconds:.1f} s{resumed}")
        if self.quality is None:
            table.add_row("quality", "not measured")
        else:
            q = self.quality
            table.add_row(
                "KL divergence", f"{q.kl_mean:.5f} ± {q.kl_se:.5f} nats per token, {q.tokens} tokens"
            )
            table.add_row("same top-1", f"{100 * q.top1_agreement:.2f} %")
            table.add_row(
                "perplexity",
                f"{q.perplexity:.4f}, original {q.perplexity_original:.4f} (ratio {q.perplexity_ratio:.4f})",
            )
        for index, layer in enumerate(self.worst_layers()):
            label = "worst layers" if index == 0 else ""
            table.add_row(
                label, f"{escape(layer.name)}  relative error {layer.relative_error:.2e}, {layer.bits} bit"
            )
        table.add_row("manifest", f"sha256 {self.manifest_sha256}")
        table.add_row("try next", escape(f'qrun generate {self.output} --prompt "Once upon a time"'))
        table.add_row("", escape(f"qrun bench {self.output}"))
        console.print(table, soft_wrap=True)

    def _skipped_by_reason(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for layer in self.linears_skipped:
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
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
