"""What a compilation will need, told before it starts: `--dry-run`, and the check for memory and disk."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.options import CompileOptions
from qcompiler.passes import QuantizedLinear
from qcompiler.plan import CompilePlan, make_plan
from qcompiler.progress import Progress
from qcompiler.report import SkippedLayer, by_reason, format_bytes, shorten
from qcompiler.sizes import Sizes

if TYPE_CHECKING:
    from rich.console import Console

# Interpreter, torch, transformers and the graph itself; measured at about 0.6 GB, rounded up.
_BASE_BYTES = 800 << 20
# fp32 copies of a weight that a solver holds beside the weight itself (it works through rows in chunks).
_SOLVER_COPIES = 2
_SHARD_BYTES = 256 << 20
_ASSUMED_DISK_BYTES_PER_SECOND = 1e9


@dataclass(frozen=True)
class Estimate:
    """What `--dry-run` prints; bytes and seconds.

    Attributes:
        linears: Per planned linear: name, out_features, in_features, bits, bits per weight.
        linears_skipped: The others, and why.
        bits_per_weight: Over all weights, embeddings included.
        bits_per_weight_linears: Over the quantized linears.
        bytes: Size of the artifact's weights.
        memory_bytes: Peak host memory.
        gpu_memory_bytes: Peak GPU memory, 0 on the CPU.
        disk_bytes: Free disk needed while compiling: the artifact and the finished layers beside it.
        embeddings: The planned embedding tables, described as the linears are.
        seconds: Time, from timing the method on a sample on this machine; evaluation not included.
    """

    model: str
    method: str
    device: str
    linears: list[dict[str, Any]]
    linears_skipped: list[SkippedLayer]
    bits_per_weight: float
    bits_per_weight_linears: float
    bytes: int
    memory_bytes: int
    gpu_memory_bytes: int
    disk_bytes: int
    seconds: float
    embeddings: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """Write the tables."""
        from rich.markup import escape
        from rich.table import Table

        shapes: dict[tuple[int, int, int, float], list[str]] = {}
        for layer in [*self.linears, *self.embeddings]:
            key = (layer["out_features"], layer["in_features"], layer["bits"], layer["bits_per_weight"])
            shapes.setdefault(key, []).append(layer["name"])
        table = Table(title=escape(f"{self.model}: {self.method} on {self.device}"), title_justify="left")
        for column, justify in (
            ("weights", "right"),
            ("shape", "left"),
            ("bits", "right"),
            ("bits/weight", "right"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("such as")
        for (rows, columns, bits, stored), names in shapes.items():
            table.add_row(
                str(len(names)), f"{rows} x {columns}", str(bits), f"{stored:.3f}", escape(names[0])
            )
        console.print(table)
        for reason, names in by_reason(self.linears_skipped).items():
            console.print(escape(f"skipped {len(names)}: {reason} ({shorten(names)})"), highlight=False)
        linears = f"{self.bits_per_weight_linears:.3f} in the quantized linears"
        for label, text in (
            ("bits per weight", f"{self.bits_per_weight:.3f} with embeddings, {linears}"),
            ("size", format_bytes(self.bytes)),
            ("memory needed", format_bytes(self.memory_bytes)
             + (f", GPU {format_bytes(self.gpu_memory_bytes)}" if self.gpu_memory_bytes else "")),
            ("disk needed", format_bytes(self.disk_bytes)),
            ("time", f"about {self.seconds:.0f} s" if self.seconds >= 1 else "about a second"),
        ):  # fmt: skip
            console.print(f"{label:16} {text}", highlight=False)


def dry_run(options: CompileOptions, progress: Progress | None = None) -> Estimate:
    """Plan a compilation and say what it would need. Writes nothing."""
    plan = make_plan(options)
    for note in plan.captured.notes:
        (progress or Progress()).note(note)
    sizes = Sizes(plan)
    memory, gpu = memory_needed(plan)
    return Estimate(
        model=options.model,
        method=options.method,
        device=str(plan.device),
        linears=[described(layer, sizes) for layer in plan.linears],
        linears_skipped=plan.skipped,
        bits_per_weight=sizes.bits_per_weight,
        bits_per_weight_linears=sizes.bits_per_weight_linears,
        bytes=sizes.bytes,
        memory_bytes=memory,
        gpu_memory_bytes=gpu,
        disk_bytes=disk_needed(sizes),
        seconds=seconds_needed(plan),
        embeddings=[described(layer, sizes) for layer in plan.embeddings],
    )


def described(layer: QuantizedLinear, sizes: Sizes) -> dict[str, Any]:
    """One planned weight; of experts, `out_features` are the rows of all together."""
    return {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "bits": getattr(layer.spec, "bits", 0),
        "bits_per_weight": sizes.layer_bits(layer),
    }


def check_resources(plan: CompilePlan) -> None:
    """Refuse what cannot finish, before hours of work.

    Raises:
        InvalidInputError: Not enough free memory, GPU memory or disk.
    """
    import psutil

    memory, gpu = memory_needed(plan)
    available = psutil.virtual_memory().available
    # What this process holds already is part of the need, not on top of it.
    if memory > available + psutil.Process().memory_info().rss:
        raise InvalidInputError(
            f"compiling needs about {format_bytes(memory)} of memory, {format_bytes(available)} are free",
            hint="Free some memory, or lower --eval-tokens.",
        )
    if gpu:
        free, _ = torch.cuda.mem_get_info(plan.device)
        if gpu > free:
            raise InvalidInputError(
                f"compiling needs about {format_bytes(gpu)} on {plan.device}, {format_bytes(free)} are free",
                hint="Use --device cpu, or lower --eval-tokens.",
            )
    disk = disk_needed(Sizes(plan))
    free_disk = shutil.disk_usage(plan.options.output_path.resolve().parent).free
    if disk > free_disk:
        raise InvalidInputError(
            f"compiling needs {format_bytes(disk)} of free disk beside {plan.options.output_path}, "
            f"{format_bytes(free_disk)} are free",
            hint="Free some space, or choose another folder with -o.",
        )


def memory_needed(plan: CompilePlan) -> tuple[int, int]:
    """Peak host and GPU bytes: the largest weight with its solver copies, or the evaluation's activations."""
    # Experts are read together, twice while a checkpoint's matrices are stacked, and solved one by one.
    solver = max(
        (
            layer.out_features * layer.in_features * plan.dtype.itemsize * (2 if layer.experts > 1 else 1)
            + layer.out_features // layer.experts * layer.in_features * 4 * _SOLVER_COPIES
            for layer in plan.layers
        ),
        default=0,
    )
    weights = [tensor.numel() for tensor in plan.captured.graph.state_dict().values()]
    widths = ((layer.out_features // layer.experts, layer.in_features) for layer in plan.linears)
    widest = max((size for pair in widths for size in pair), default=0)
    head = max(weights, default=0) * plan.dtype.itemsize
    # Both models' activations, a handful of [tokens, width] tensors in fp32, and both heads at once.
    evaluation = 2 * (6 * plan.options.eval_tokens * widest * 4 + head) if plan.options.eval_tokens else 0
    work = max(solver, evaluation)
    if plan.device.type == "cuda":
        return _BASE_BYTES + 2 * head + _SHARD_BYTES, work
    return _BASE_BYTES + max(work, head + _SHARD_BYTES), 0


def disk_needed(sizes: Sizes) -> int:
    """The artifact, and the finished layers that stand beside it until the end."""
    return 2 * sizes.bytes


def seconds_needed(plan: CompilePlan) -> float:
    """Seconds to quantize all linears and move their bytes, from timing the method on a sample here."""
    if not plan.layers:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    layer = max(plan.layers, key=lambda item: item.out_features * item.in_features)
    method, method_options = plan.method_of(layer)
    rows = max(1, min(layer.out_features, (1 << 18) // layer.in_features))
    sample = torch.randn(rows, layer.in_features, generator=generator).mul_(0.02).to(plan.device)
    method.quantize(sample, layer.spec, method_options, name="sample")  # the first call warms up
    started = time.perf_counter()
    method.quantize(sample, layer.spec, method_options, name="sample")
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    per_weight = (time.perf_counter() - started) / sample.numel()
    weights = sum(item.out_features * item.in_features for item in plan.layers)
    moved = plan.checkpoint.bytes + 3 * Sizes(plan).bytes
    return weights * per_weight + moved / _ASSUMED_DISK_BYTES_PER_SECOND
