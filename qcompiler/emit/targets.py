"""What a compilation emits beside, or instead of, its artifact (`--emit`): decided before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console

    from qcompiler.methods.base import Method
    from qcompiler.options import CompileOptions
    from qcompiler.plan import CompilePlan
    from qcompiler.progress import Progress

ARTIFACT = "artifact"
ONNX = "onnx"
PT2 = "pt2"
AOTI = "aoti"
TARGETS = (ARTIFACT, ONNX, PT2, AOTI)
_FILES = {PT2: ".pt2", AOTI: "-aoti.pt2"}


@dataclasses.dataclass(frozen=True)
class FileEmission:
    """One file that was emitted: its target, path and bytes."""

    target: str
    path: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return dataclasses.asdict(self)

    def print(self, console: Console) -> None:
        """One line: where, and how large."""
        console.print(f"{self.target:15}{self.path}, {self.bytes / 1e6:.2f} MB", highlight=False)


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets named in `--emit a,b`, each once.

    Raises:
        InvalidInputError: One is not known, or none is named.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TARGETS:
            raise InvalidInputError(
                f"there is nothing {name!r} to emit", hint=f"Choose from {', '.join(TARGETS)}."
            )
    if not names:
        raise InvalidInputError("--emit names nothing", hint=f"Choose from {', '.join(TARGETS)}.")
    return names


def emission_path(options: CompileOptions, target: str) -> Path:
    """Where a target goes: the output itself if it is the only folder, else beside it."""
    output = options.output_path
    if target in _FILES:
        return output.with_name(output.name + _FILES[target])
    if target == ARTIFACT:
        # Every emission is made from an artifact; one that was not asked for is removed afterwards.
        return output if ARTIFACT in options.emit else output.with_name(output.name + ".artifact")
    return output if options.emit == (target,) else output.with_name(f"{output.name}-{target}")


def settle_options(options: CompileOptions, method: Method) -> CompileOptions:
    """The options as the targets need them: ONNX wants integer zero points, and has some widths only.

    Raises:
        InvalidInputError: Names the option and the choices that would do.
    """
    if ONNX not in options.emit:
        return options
    from qcompiler.emit.onnx.check import CHOICES, EMBEDDING_BITS, check_formats, require_onnx

    if "zeros" in method.options:
        if options.method_options.get("zeros", "integer") != "integer":
            raise InvalidInputError("ONNX takes integer zero points", hint="Drop --option zeros=float.")
        options = dataclasses.replace(options, method_options={**options.method_options, "zeros": "integer"})
    widths: list[tuple[str, int]] = [(f"--bits {options.bits}", options.bits)]
    widths += [(f"--bits {pattern}={bits}", bits) for pattern, bits in options.bits_overrides]
    if options.lm_head_bits is not None:
        widths.append((f"--lm-head-bits {options.lm_head_bits}", options.lm_head_bits))
    if method.quantizes:
        check_formats(
            (name, method.resolve_spec(bits, options.group_size, method.validate(options.method_options)))
            for name, bits in widths
        )
    if options.embedding_bits is not None and options.embedding_bits not in EMBEDDING_BITS:
        raise InvalidInputError(f"ONNX gathers no {options.embedding_bits}-bit embeddings", hint=CHOICES)
    require_onnx()
    return options


def check_plan(plan: CompilePlan) -> None:
    """Refuse what a target cannot say of a planned model.

    Raises:
        InvalidInputError: Names the layer or the op.
    """
    if ONNX in plan.options.emit:
        from qcompiler.emit.onnx.check import check_plan as check_onnx

        check_onnx(plan)


def check_destinations(options: CompileOptions) -> None:
    """Refuse destinations that are taken.

    Raises:
        InvalidInputError: One exists (without --overwrite), or is something else.
    """
    from qcompiler.emit.artifact import check_destination

    check_destination(emission_path(options, ARTIFACT), overwrite=options.overwrite)
    if ONNX in options.emit:
        from qcompiler.emit.onnx.files import MODEL

        check_destination(emission_path(options, ONNX), overwrite=options.overwrite, mark=MODEL)
    for target in _FILES:
        path = emission_path(options, target)
        if target in options.emit and path.exists() and not options.overwrite:
            raise InvalidInputError(f"{path} exists", hint="Give --overwrite to replace it.")


def emit_targets(options: CompileOptions, progress: Progress) -> dict[str, Any]:
    """Emit the other targets from the artifact that was written; returns their reports by name."""
    reports: dict[str, Any] = {}
    if ONNX in options.emit:
        from qcompiler.emit.onnx.emit import emit_onnx
        from qcompiler.runtime.artifact import open_artifact

        artifact = open_artifact(emission_path(options, ARTIFACT))
        reports[ONNX] = emit_onnx(
            artifact, emission_path(options, ONNX), overwrite=options.overwrite, progress=progress
        )
    for target in _FILES:
        if target in options.emit:
            path = emission_path(options, target)
            _emit_file(target, emission_path(options, ARTIFACT), path, options.device)
            reports[target] = FileEmission(target, str(path), path.stat().st_size)
    return reports


def _emit_file(target: str, artifact: Path, path: Path, device: str) -> None:
    if target == PT2:
        from qcompiler.emit.pt2 import emit_pt2

        emit_pt2(artifact, path)
    else:
        from qcompiler.emit.aoti import emit_aoti
        from qcompiler.plan import pick_device

        emit_aoti(artifact, path, device=pick_device(device).type)
