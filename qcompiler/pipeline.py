"""The road from a checkpoint to an artifact: plan, quantize, measure, lower, write."""

from __future__ import annotations

import copy
import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler import __version__
from qcompiler.allocation.allocate import Allocation, allocate
from qcompiler.allocation.curve import Point, check_plot, draw
from qcompiler.allocation.preview import preview
from qcompiler.calibration.runner import PartStore
from qcompiler.capture import ModelSource
from qcompiler.checkpoint.identity import checkpoint_fingerprint
from qcompiler.emit.artifact import ArtifactInfo, WrittenArtifact, write_artifact
from qcompiler.emit.targets import ARTIFACT, check_destinations, emission_path, emit_targets
from qcompiler.estimate import check_resources
from qcompiler.kernels.errors import InvalidInputError, QualityGateError
from qcompiler.measure import measure_quality
from qcompiler.options import CompileOptions
from qcompiler.passes import PassManager, PassResult, lowering_passes
from qcompiler.passes.graph_inputs import PAGE_INPUTS
from qcompiler.plan import CompilePlan, make_plan
from qcompiler.progress import Progress
from qcompiler.quality import Quality
from qcompiler.quantize_weights import WeightStream
from qcompiler.report import CompileReport, EmbeddingReport, LayerReport, peak_rss_bytes
from qcompiler.sizes import Sizes
from qcompiler.workspace import Workspace, writing


def compile_model(options: CompileOptions, progress: Progress | None = None) -> CompileReport:
    """Compile a model into an artifact folder.

    Args:
        options: What to do.
        progress: Told about long stages; quiet by default.

    Returns:
        What was done, with sizes, times and quality.

    Raises:
        InvalidInputError: The input or an option was refused; nothing is left in place.
        QualityGateError: `max_kl` was exceeded; nothing is left in place.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    output = emission_path(options, ARTIFACT)
    check_output(options)
    plan = make_plan(options, opened=read_soon)
    check_cache(plan)
    for note in plan.captured.notes:
        progress.note(note)
    if options.has_target:
        bound, choices = preview(plan)
        check_resources(bound, choices.trials)
    else:
        check_resources(plan)
    with Workspace(
        output, fingerprint(plan), resume=options.resume, overwrite=options.overwrite
    ) as workspace:
        resumed = workspace.count
        allocation = None
        try:
            if options.has_target:
                trial = allocate(plan, workspace, progress, partial(quantize_plan, progress=progress))
                plan, allocation, quality = trial.plan, trial.allocation, trial.quality
                stream, layers = trial.done
            else:
                (stream, layers), quality = quantize_plan(plan, workspace, progress)
            check_gate(options, quality)
        except QualityGateError:
            workspace.discard()
            raise
        with writing(output):
            written = emit(plan, stream, layers, quality, allocation)
        workspace.discard()
    emissions = emit_targets(plan.options, progress)
    if ARTIFACT not in options.emit:
        shutil.rmtree(output)
    if allocation is not None and options.report_plot is not None:
        draw_allocation(options.report_plot, allocation, quality)
    sizes = Sizes(plan)
    return CompileReport(
        output=str(options.output_path),
        bytes=written.nbytes,
        bits_per_weight=sizes.bits_per_weight,
        bits_per_weight_linears=sizes.bits_per_weight_linears,
        linears_quantized=plan.linears_quantized,
        linears_skipped=plan.skipped,
        linears_total=plan.linears_quantized + len(plan.skipped),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if plan.device.type == "cuda" else 0,
        quality=quality,
        manifest_sha256=written.manifest_sha256,
        layers=layers,
        resumed_layers=resumed,
        embeddings=[
            EmbeddingReport(layer.name, sizes.layer_bits(layer), layer.shared_with)
            for layer in plan.embeddings
        ],
        kv_cache=options.kv_format or "plain",
        emissions=emissions,
        allocation=allocation,
    )


def read_soon(source: ModelSource) -> None:
    """Let the disk work while the model is captured, as far as free memory goes."""
    import psutil

    if source.checkpoint is not None:
        source.checkpoint.read_soon(psutil.virtual_memory().available // 2)


def quantize_plan(
    plan: CompilePlan, store: PartStore, progress: Progress
) -> tuple[tuple[WeightStream, list[LayerReport]], Quality | None]:
    """Quantize what a plan names, and measure the quality of it."""
    stream = WeightStream(plan, store)
    layers = stream.quantize_all(progress)
    return (stream, layers), measure_quality(plan, stream, progress)


def draw_allocation(path: Path, allocation: Allocation, quality: Quality | None) -> None:
    """Draw the trade-off that an allocation was chosen from, with what was measured."""
    measured = {trial["bits_per_weight"]: trial["kl"] for trial in allocation.trials}
    if quality is not None and allocation.sensitivity == "output":
        measured[allocation.bits_per_weight] = quality.kl_mean
    chosen = Point("auto", allocation.bits_per_weight, allocation.predicted)
    with writing(path):
        draw(path, allocation.points, chosen, unit=allocation.unit, measured=measured)


def check_output(options: CompileOptions) -> None:
    """Refuse a destination that is taken, before any work.

    Raises:
        InvalidInputError: It exists (without --overwrite), or is no artifact.
    """
    if options.report_plot is not None:
        check_plot(options.report_plot)
    with writing(options.output_path):
        options.output_path.parent.mkdir(parents=True, exist_ok=True)
    check_destinations(options)


def check_cache(plan: CompilePlan) -> None:
    """Refuse a quantized KV cache for a model that has none.

    Raises:
        InvalidInputError: The model is an encoder.
    """
    if plan.captured.kind != "decoder" and plan.options.kv_format is not None:
        raise InvalidInputError(
            f"kv_bits {plan.options.kv_bits} was given, but an encoder has no KV cache",
            hint="Drop --kv-bits.",
        )


def check_gate(options: CompileOptions, quality: Quality | None) -> None:
    """Hold the measured quality against `--max-kl`; what could not be measured does not pass.

    Raises:
        QualityGateError: It does not pass.
    """
    if options.max_kl is None:
        return
    if quality is None:
        raise QualityGateError(
            "--max-kl was given, but the quality of this model could not be measured; no artifact was kept",
            hint="The checkpoint needs a tokenizer.json, and the model must be a decoder.",
        )
    quality.require(options.max_kl)


def emit(
    plan: CompilePlan,
    stream: WeightStream,
    layers: list[LayerReport],
    quality: Quality | None,
    allocation: Allocation | None = None,
) -> WrittenArtifact:
    """Lower the planned graph and write the artifact."""
    graph = copy.deepcopy(plan.quantized_graph)
    dump = plan.options.dump_graphs
    manager = PassManager(
        lowering_passes(plan.captured.kind, kv_format=plan.options.kv_format, fuse=plan.options.fuse),
        dump_dir=dump and dump / "3-lowered",
    )
    plan.passes.extend(manager.run(graph))
    sizes = Sizes(plan)
    # Times and machines stay out of the artifact: the same input gives the same bytes.
    report = {
        "bits_per_weight": sizes.bits_per_weight,
        "bits_per_weight_linears": sizes.bits_per_weight_linears,
        "linears_quantized": plan.linears_quantized,
        "embeddings": [
            {"name": layer.name, "bits_per_weight": sizes.layer_bits(layer), "shared_with": layer.shared_with}
            for layer in plan.embeddings
        ],
        "linears_skipped": [{"name": s.name, "reason": s.reason} for s in plan.skipped],
        "layers": [vars(layer) for layer in layers],
        "kv_cache": kv_cache_report(plan, graph),
        "quality": quality.to_json() if quality else None,
        "passes": [passed(result) for result in plan.passes],
    }
    if allocation is not None:
        report["allocation"] = allocation.to_json()
    return write_artifact(
        emission_path(plan.options, ARTIFACT),
        graph,
        tensors_of(graph, stream),
        info=artifact_info(plan, sizes),
        files=plan.carried_files(),
        report=lambda size: {**report, "bytes": size},
        overwrite=plan.options.overwrite,
    )


def kv_cache_report(plan: CompilePlan, lowered: GraphModule) -> dict[str, Any]:
    """What the cache stores: its format, and bytes per token over all layers."""
    pages = [node.meta["val"] for node in lowered.graph.nodes if str(node.target).startswith(PAGE_INPUTS)]
    per_token = sum(math.prod(page.shape[2:]) * page.dtype.itemsize for page in pages)
    return {"format": plan.options.kv_format or "plain", "bytes_per_token": per_token}


def tensors_of(graph: GraphModule, stream: WeightStream) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the graph reads, once, in the order of its first use."""
    seen: set[str] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in seen:
            seen.add(str(node.target))
            yield str(node.target), stream.tensor(graph, str(node.target))


def artifact_info(plan: CompilePlan, sizes: Sizes) -> ArtifactInfo:
    """What the manifest says of the model and of how it was made."""
    config = plan.captured.config
    generation = plan.generation_config()
    details = {
        "producer": f"qcompiler {__version__}",
        "method": {"name": plan.options.method, "options": plan.method_options},
        "source": {
            "name": plan.options.model.rstrip("/").rsplit("/", 1)[-1],
            "fingerprint": checkpoint_fingerprint(plan.checkpoint.folder),
        },
        "bits_per_weight": sizes.bits_per_weight,
        "bits_per_weight_linears": sizes.bits_per_weight_linears,
    }
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ArtifactInfo(
        kind=plan.captured.kind,
        dtype=str(plan.dtype).removeprefix("torch."),
        model_type=str(config.get("model_type", "unknown")),
        vocab_size=plan.captured.vocab_size,
        max_context=plan.captured.max_positions or 1 << 20,
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (int(eos),)),
        bos_token_id=generation.get("bos_token_id", config.get("bos_token_id")),
        details=details,
    )


def passed(result: PassResult) -> dict[str, Any]:
    """One pass for the report: what it matched, and why not elsewhere, by reason."""
    reasons: dict[str, int] = {}
    for _, reason in result.skipped:
        reasons[reason] = reasons.get(reason, 0) + 1
    saved = {"launches": result.launches_saved, "bytes_per_token": result.bytes_saved}
    return {
        "name": result.name,
        "matched": result.matched,
        "skipped": reasons,
        **({"saved": saved} if result.launches_saved else {}),
    }


def fingerprint(plan: CompilePlan) -> dict[str, Any]:
    """What must be equal for an unfinished compilation to be continued."""
    return {
        "qcompiler": __version__,
        "torch": torch.__version__,
        "device": plan.device.type,
        "source": checkpoint_fingerprint(plan.checkpoint.folder),
        "layers": hashlib.sha256(
            repr([(layer.name, layer.spec.to_json()) for layer in plan.layers]).encode()
        ).hexdigest(),
        **plan.options.fingerprint(),
    }
