"""An artifact as a folder for onnxruntime: staged beside its destination and renamed, like an artifact.

model.onnx  model.onnx.data  genai_config.json  report.json  README.md
config.json  tokenizer.json  tokenizer_config.json  chat_template.jinja ... (those that the artifact has)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompiler.data import default_text
from qcompiler.emit.artifact import staging
from qcompiler.emit.onnx.check import check_formats, require_onnx
from qcompiler.emit.onnx.files import MODEL, write_model
from qcompiler.emit.onnx.genai import genai_config
from qcompiler.emit.onnx.graph import GraphOptions, OnnxGraph, translate_graph
from qcompiler.emit.onnx.integer import IntegerZeros, float_zero_layers, resolved_quality
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.progress import Progress
from qcompiler.quality import Quality
from qcompiler.runtime.artifact import Artifact

if TYPE_CHECKING:
    from rich.console import Console

_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class OnnxOptions:
    """How an artifact is emitted.

    Attributes:
        dtype: Activation dtype of the ONNX graph: float32 or float16.
        zeros: "integer": affine weights with other zero points are solved again. "float": zero points are
            emitted as they are, which onnxruntime's CPU takes for 2 and 4 bits only, and slowly.
        accuracy_level: Of MatMulNBits: 0 leaves activations as they are, 4 rounds them to int8 (faster).
        attention: "auto": GroupQueryAttention where it can say the model; "plain": basic operators.
        eval_tokens: Tokens of text to compare solved weights with the artifact's on; 0 does not.
    """

    dtype: str = "float32"
    zeros: str = "integer"
    accuracy_level: int = 0
    attention: str = "auto"
    eval_tokens: int = 4096

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", ("float32", "float16")),
            ("zeros", ("integer", "float")),
            ("accuracy_level", (0, 4)),
            ("attention", ("auto", "plain")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"onnx: {name} cannot be {getattr(self, name)!r}",
                    hint=f"Choose from {', '.join(map(str, allowed))}.",
                )


@dataclass(frozen=True)
class OnnxReport:
    """What was emitted.

    Attributes:
        output: The folder.
        bytes: Size of model and weights.
        operators: How often each ONNX operator stands in the model.
        solved_again: Weights whose zero points were made integers.
        against_artifact: Their figures against the artifact, if there were any and it could be measured.
        against_original: The artifact's figures against the original model, as its report has them.
        notes: What the user should know.
    """

    output: str
    bytes: int
    operators: dict[str, int]
    solved_again: int
    against_artifact: Quality | None
    against_original: dict[str, Any] | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        quality = self.against_artifact
        return {**asdict(self), "against_artifact": quality.to_json() if quality else None}

    def print(self, console: Console) -> None:
        """Print it for people."""
        rows = [("onnx", self.output), ("size", f"{self.bytes / 1e6:.2f} MB")]
        if self.solved_again:
            rows.append(("zero points", f"made integers in {self.solved_again} weights"))
        if self.against_artifact is not None:
            quality = self.against_artifact
            rows.append(("KL divergence", f"{quality.kl_mean:.5f} ± {quality.kl_se:.5f} from the artifact"))
        if self.against_original is not None and "kl_mean" in self.against_original:
            what = "artifact, from the original" if self.solved_again else "from the original"
            rows.append(("KL divergence", f"{self.against_original['kl_mean']:.5f} ({what})"))
        rows += [("note", note) for note in self.notes]
        for name, text in rows:
            console.print(f"{name:<15}{text}", highlight=False, markup=False, soft_wrap=True)


def emit_onnx(
    artifact: Artifact,
    out: Path,
    options: OnnxOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OnnxReport:
    """Emit an artifact for onnxruntime.

    Args:
        artifact: An opened artifact.
        out: Destination folder; its parent must exist.
        options: See `OnnxOptions`.
        overwrite: Replace an emission that is there.
        progress: Told about long stages.

    Raises:
        InvalidInputError: `out` exists, the onnx package is missing, or ONNX cannot say a format or an op.
    """
    options = options or OnnxOptions()
    progress = progress or Progress()
    require_onnx()
    layers = artifact.manifest.layers
    check_formats((layer.name, get_format(layer.format).spec_from_json(layer.spec)) for layer in layers)
    graph = _translate(artifact, options, dry=True)
    with staging(out, overwrite=overwrite, mark=MODEL) as folder:
        source, solved, quality = artifact, [], None
        if options.zeros == "integer":
            solved = float_zero_layers(artifact)
        if solved:
            source = IntegerZeros(artifact, solved)
            with progress.stage("compare zero points", 1) as advance:
                quality = resolved_quality(artifact, source, default_text("eval"), options.eval_tokens)
                advance("")
        graph = _translate(source, options, dry=False)
        with progress.stage("write onnx", len(graph.weights)):
            size = write_model(folder, graph)
        report = OnnxReport(
            str(out), size, graph.operators, len(solved), quality, _original_quality(artifact), graph.notes
        )
        _write_companions(folder, artifact, graph, report, options)
    for note in graph.notes:
        progress.note(note)
    return report


def _translate(artifact: Artifact, options: OnnxOptions, *, dry: bool) -> OnnxGraph:
    entries = artifact.tensors.entries
    return translate_graph(
        artifact.graph,
        {name: TensorSpec(tuple(entry.shape), entry.dtype) for name, entry in entries.items()},
        None if dry else artifact.read,
        GraphOptions(
            artifact.dtype,
            getattr(torch, options.dtype),
            vocab_size=artifact.manifest.model.vocab_size,
            position_offset=artifact.manifest.model.position_offset,
            accuracy_level=options.accuracy_level,
            plain_attention=options.attention == "plain",
            float_zeros=options.zeros == "float",
        ),
    )


def _original_quality(artifact: Artifact) -> dict[str, Any] | None:
    report = artifact.json("report.json")
    quality = report.get("quality") if isinstance(report, dict) else None
    return quality if isinstance(quality, dict) else None


def _write_companions(
    folder: Path, artifact: Artifact, graph: OnnxGraph, report: OnnxReport, options: OnnxOptions
) -> None:
    files: dict[str, bytes] = {}
    for name in _CARRIED:
        path = artifact.path(name)
        if path is not None:
            files[name] = path.read_bytes()
    if graph.caches:
        config = genai_config(artifact, graph)
        if config is not None:
            files["genai_config.json"] = _json(config)
    told = {key: value for key, value in report.to_json().items() if key != "output"}
    files["report.json"] = _json({**told, "options": asdict(options)})
    files["README.md"] = _card(artifact, report).encode()
    for name, content in files.items():
        with (folder / name).open("xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _card(artifact: Artifact, report: OnnxReport) -> str:
    manifest = artifact.manifest
    return "\n".join(
        [
            f"# {Path(report.output).name}",
            "",
            "Emitted by qcompiler for onnxruntime.",
            "",
            f"- architecture: {manifest.model.model_type}, {manifest.kind}",
            f"- quantized weights: {len(manifest.layers)}",
            f"- operators: {', '.join(f'{name} {count}' for name, count in report.operators.items())}",
            *(f"- {note}" for note in report.notes),
            "",
        ]
    )
