"""What a compilation will need, told before it starts: `--dry-run`, and the check for memory and disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.allocation.preview import Preview, preview
from qcompiler.allocation.sensitivity import OBSERVED_TOKENS
from qcompiler.calibrate_plan import calibration_windows
from qcompiler.calibration import cut_blocks
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.methods.calibrated import CalibratedMethod
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
# fp32 copies of a block's weights, and of its widest Gram matrix, that a calibrated method holds at its peak.
_BLOCK_COPIES = 8
_GRAM_COPIES = 10
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
        phases: Seconds of calibration by phase, where the method can tell; part of `seconds`.
        allocation: With a target: what is known of the choices; the other figures are then those of one
            uniform choice, and `seconds` counts every candidate once.
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
    allocation: Preview | None = None
    phases: dict[str, float] = field(default_factory=dict)

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
        for line in self.allocation.lines() if self.allocation else ():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        for reason, names in by_reason(self.linears_skipped).items():
            console.print(escape(f"skipped {len(names)}: {reason} ({shorten(names)})"), highlight=False)
        linears = f"{self.bits_per_weight_linears:.3f} in the quantized linears"
        for label, text in (
            ("bits per weight", f"{self.bits_per_weight:.3f} with embeddings, {linears}"),
            ("size", format_bytes(self.bytes)),
            ("memory needed", format_bytes(self.memory_bytes)
             + (f", GPU {format_bytes(self.gpu_memory_bytes)}" if self.gpu_memory_bytes else "")),
            ("disk needed", format_bytes(self.disk_bytes)),
            ("time", about(self.seconds)),
            *([("calibration", shares(self.phases))] if self.phases else []),
        ):  # fmt: skip
            console.print(f"{label:16} {text}", highlight=False)


def dry_run(options: CompileOptions, progress: Progress | None = None) -> Estimate:
    """Plan a compilation and say what it would need. Writes nothing."""
    plan = make_plan(options)
    for note in plan.captured.notes:
        (progress or Progress()).note(note)
    choices = None
    if options.has_target:
        plan, choices = preview(plan)
    sizes = Sizes(plan)
    memory, gpu = memory_needed(plan)
    phases, calibrated = calibration_seconds(plan)
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
        disk_bytes=disk_needed(sizes, choices.trials if choices else 1),
        seconds=sum(phases.values())
        + seconds_needed(plan, calibrated) * (len(choices.candidates) + choices.trials if choices else 1),
        embeddings=[described(layer, sizes) for layer in plan.embeddings],
        allocation=choices,
        phases=phases,
    )


def about(seconds: float) -> str:
    """A time as one would say it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} s" if seconds >= 1 else "about a second"


def shares(phases: dict[str, float]) -> str:
    """Phases by falling share of their sum."""
    total = sum(phases.values())
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in ordered)


def described(layer: QuantizedLinear, sizes: Sizes) -> dict[str, Any]:
    """One planned weight; of experts, `out_features` are the rows of all together."""
    return {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "bits": getattr(layer.spec, "bits", 0),
        "bits_per_weight": sizes.layer_bits(layer),
    }


def check_resources(plan: CompilePlan, trials: int = 1) -> None:
    """Refuse what cannot finish, before hours of work.

    Args:
        plan: With a target, one that bounds the size.
        trials: How often the layers may be quantized and kept.

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
    disk = disk_needed(Sizes(plan), trials)
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
    # While one weight is worked on, the next is read; three shards are collected or being written.
    read = max((x.out_features * x.in_features * plan.dtype.itemsize for x in plan.layers), default=0)
    shards = min(3 * _SHARD_BYTES, Sizes(plan).bytes)
    # Both models' activations, a handful of [tokens, width] tensors in fp32, and both heads at once.
    evaluation = 2 * (6 * plan.options.eval_tokens * widest * 4 + head) if plan.options.eval_tokens else 0
    work = max(solver, evaluation, calibration_memory(plan))
    if plan.options.has_target and plan.options.sensitivity == "output":
        work = max(work, observation_bytes(plan))
    if plan.device.type == "cuda":
        return _BASE_BYTES + max(2 * read, 2 * head + shards), work
    return _BASE_BYTES + max(work + read, 2 * head + shards), 0


def calibration_memory(plan: CompilePlan) -> int:
    """Bytes where a calibrated method computes: streams of the text, and one block with its solvers."""
    if not isinstance(plan.method, CalibratedMethod):
        return 0
    windows, context = calibration_windows(plan)
    largest = 0
    for block in cut_blocks(plan.captured.graph)[1]:
        weights = sum(linear.out_features * linear.in_features for linear in block.linears)
        narrow = min((linear.in_features for linear in block.linears), default=0)
        wide = max((linear.in_features for linear in block.linears), default=0)
        # Two streams and the block's targets in fp32; the block's weights with those that were found, their
        # codes and gradients; copies of the widest input's Gram matrix, most of them in fp64.
        streams = 3 * 4 * windows * context * narrow
        largest = max(largest, streams + 4 * _BLOCK_COPIES * weights + 4 * _GRAM_COPIES * wide**2)
    return largest


def observation_bytes(plan: CompilePlan) -> int:
    """Peak bytes of measuring sensitivities on text: streams between blocks, and one block with gradients."""
    _, blocks, _ = cut_blocks(plan.captured.graph)
    tokens = 4 * min(plan.options.calib_tokens, OBSERVED_TOKENS)
    borders = sum(min((linear.in_features for linear in block.linears), default=0) for block in blocks)
    values = max(sum(x.in_features + x.out_features for x in block.linears) for block in blocks)
    weights = max(sum(x.in_features * x.out_features for x in block.linears) for block in blocks)
    return tokens * (borders + 2 * values) + 8 * weights  # the windows, and those of a linear end to end


def disk_needed(sizes: Sizes, trials: int = 1) -> int:
    """The artifact, and the finished layers that stand beside it until the end, once for each trial."""
    return (1 + trials) * sizes.bytes


def calibration_seconds(plan: CompilePlan) -> tuple[dict[str, float], set[str]]:
    """Seconds by phase of the calibrated blocks, as the method tells, and the layers that they cover."""
    phases: dict[str, float] = {}
    covered: set[str] = set()
    if not isinstance(plan.method, CalibratedMethod):
        return phases, covered
    planned = {layer.name: layer.spec for layer in plan.layers}
    windows, context = calibration_windows(plan)
    for block in cut_blocks(plan.captured.graph)[1]:
        specs = {linear.name: planned[linear.name] for linear in block.linears if linear.name in planned}
        found = plan.method.block_seconds(block, specs, plan.method_options, windows, context, plan.device)
        for name, seconds in found.items():
            phases[name] = phases.get(name, 0.0) + seconds
        covered.update(specs if found else ())
    return phases, covered


def seconds_needed(plan: CompilePlan, covered: Collection[str] = ()) -> float:
    """Seconds to quantize linears that are not `covered`, from timing the method on a sample here.

    And to move the bytes of all.
    """
    moved = plan.checkpoint.bytes + 3 * Sizes(plan).bytes
    layers = [layer for layer in plan.layers if layer.name not in covered]
    if not layers:
        return moved / _ASSUMED_DISK_BYTES_PER_SECOND if plan.layers else 0.0
    generator = torch.Generator().manual_seed(0)
    layer = max(layers, key=lambda item: item.out_features * item.in_features)
    method, method_options = plan.method_of(layer)
    rows = max(1, min(layer.out_features, (1 << 18) // layer.in_features))
    sample = torch.randn(rows, layer.in_features, generator=generator).mul_(0.02).to(plan.device)
    method.quantize(sample, layer.spec, method_options, name="sample")  # the first call warms up
    started = time.perf_counter()
    method.quantize(sample, layer.spec, method_options, name="sample")
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    per_weight = (time.perf_counter() - started) / sample.numel()
    weights = sum(item.out_features * item.in_features for item in layers)
    return weights * per_weight + moved / _ASSUMED_DISK_BYTES_PER_SECOND
