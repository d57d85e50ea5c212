"""What a compilation emits beside, or instead of, its artifact (`--emit`): decided before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from qcompiler.methods.base import Method
    from qcompiler.options import CompileOptions
    from qcompiler.plan import CompilePlan
    from qcompiler.progress import Progress

ARTIFACT = "artifact"
ONNX = "onnx"
TARGETS = (ARTIFACT, ONNX)


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
    """Where a target goes: the output itself if it is the only one, else `<output>-<target>`."""
    output = options.output_path
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
    return reports
