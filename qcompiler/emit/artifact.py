"""Writes an artifact: staged beside its destination, fsynced, renamed into place, or not there at all.

manifest.json  graph.json  weights-*.safetensors  report.json  README.md
config.json  tokenizer.json  tokenizer_config.json  generation_config.json (those that the model has)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qcompiler.emit.graph_json import graph_to_json
from qcompiler.emit.shards import SHARD_BYTES, write_shards
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.artifact import GRAPH
from qcompiler.runtime.files import check_name
from qcompiler.runtime.graph import MAX_BYTES
from qcompiler.runtime.manifest import MANIFEST, SCHEMA, FileEntry, checksum
from qcompiler.runtime.opset import library_version, plugin_library

TensorInfo = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class ArtifactInfo:
    """What the manifest says beside files and layers.

    Args:
        kind: "decoder" or "encoder".
        dtype: Activation dtype, e.g. "bfloat16".
        model_type: transformers' name of the architecture.
        vocab_size: Rows of the logits.
        max_context: Most tokens of one sequence.
        eos_token_ids: Tokens that end a generation.
        bos_token_id: Token that starts a text, if the model has one.
        position_offset: Position id of the first token.
        compute_capability: Least (major, minor) of a GPU that runs it, or None for any.
        fallback: Whether a smaller GPU may be passed over for the CPU.
        details: Further manifest entries: method, source, bits per weight, producer.
    """

    kind: str
    dtype: str
    model_type: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    position_offset: int = 0
    compute_capability: tuple[int, int] | None = None
    fallback: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenArtifact:
    """Where an artifact stands now, its size on disk, and the SHA-256 of its manifest.json."""

    path: Path
    nbytes: int
    manifest_sha256: str
    files: dict[str, FileEntry]


def write_artifact(
    out: str | Path,
    lowered_graph: fx.GraphModule,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    info: ArtifactInfo,
    files: Mapping[str, Path | bytes] | None = None,
    report: Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None = None,
    readme: str | Callable[[Mapping[str, Any]], str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    accept: Callable[[Path], None] | None = None,
) -> WrittenArtifact:
    """Write a whole artifact.

    Args:
        out: Destination folder; its parent must exist.
        lowered_graph: The graph, of ops that the runtime runs.
        weights: Every tensor that the graph names, once; taken one by one, held up to `shard_bytes`.
        info: Contents of the manifest.
        files: Further files by name (tokenizer.json, config.json ...): a path to copy, or the bytes.
        report: report.json, or a function of the artifact's size in bytes so far that gives it.
        readme: The model card, or a function of the manifest that gives it.
        overwrite: Replace `out` if it is there.
        shard_bytes: Size of a weight shard.
        accept: Called with the complete staged artifact before it is renamed; what it raises leaves
            nothing in place (quality gates).

    Returns:
        Path, size and digest.

    Raises:
        InvalidInputError: `out` exists, another process is writing it, or weights do not match the graph.
    """
    out = Path(out)
    graph = graph_to_json(lowered_graph, kind=info.kind)
    with staging(out, overwrite=overwrite) as folder:
        entries, tensors = write_shards(folder, _expected(weights, graph["weights"]), shard_bytes=shard_bytes)
        missing = sorted(set(graph["weights"]) - set(tensors))
        if missing:
            raise InvalidInputError(f"weight {missing[0]!r} of the graph was not given")
        text = json.dumps(graph, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > MAX_BYTES:
            raise InvalidInputError(
                f"the graph takes {len(text)} bytes, more than the {MAX_BYTES} that a runtime reads"
            )
        entries[GRAPH] = _write(folder / GRAPH, text)
        for name, content in sorted((files or {}).items()):
            check_name(name, "artifact")
            entries[name] = _write(
                folder / name, content if isinstance(content, bytes) else content.read_bytes()
            )
        if report is not None:
            size = sum(e.size for e in entries.values())
            entries["report.json"] = _write(
                folder / "report.json", _pretty(report(size) if callable(report) else report)
            )
        manifest = _manifest(info, graph, tensors, expert_counts(lowered_graph))
        card = readme(manifest) if callable(readme) else readme
        entries["README.md"] = _write(folder / "README.md", (card or model_card(out.name, manifest)).encode())
        manifest["files"] = {n: {"size": e.size, "sha256": e.sha256} for n, e in sorted(entries.items())}
        manifest["checksum"] = checksum(manifest)
        written = _write(folder / MANIFEST, _pretty(manifest))
        if accept is not None:
            accept(folder)
    return WrittenArtifact(out, written.size + sum(e.size for e in entries.values()), written.sha256, entries)


@contextmanager
def staging(out: Path, *, overwrite: bool = False, mark: str = MANIFEST) -> Iterator[Path]:
    """A folder `<out>.partial` that becomes `out` when the block ends well and is removed when it does not.

    The folder is locked while in use; what a killed process left behind is cleared. `mark` is the file by
    which a folder is known to be of the kind that may be overwritten.

    Raises:
        InvalidInputError: `out` exists without `overwrite`, its parent does not, or it is being written.
    """
    check_destination(out, overwrite=overwrite, mark=mark)
    folder = out.with_name(out.name + ".partial")
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise InvalidInputError(f"{folder}: cannot be created: {e.strerror}") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidInputError(f"{out} is being written by another process") from None
        try:
            for stale in folder.iterdir():
                stale.unlink()
            yield folder
            os.fsync(lock)
            check_destination(out, overwrite=overwrite, mark=mark)
            _replace(folder, out)
        except BaseException as e:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise InvalidInputError(
                    f"{out}: cannot be written: {e.strerror}", hint="Free space, or use -o."
                ) from e
            raise
    finally:
        os.close(lock)


def check_destination(out: Path, *, overwrite: bool, mark: str = MANIFEST) -> None:
    """Raise `InvalidInputError` if an artifact (or what else has a file `mark`) cannot be put at `out`."""
    if not out.parent.is_dir():
        raise InvalidInputError(f"{out.parent} is not a folder", hint="Create it first.")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InvalidInputError(f"{out} exists", hint="Give --overwrite to replace it, or another -o.")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / mark).is_file()):
        raise InvalidInputError(
            f"{out} is not an artifact, so it is not overwritten", hint="Give another -o."
        )


def model_card(name: str, manifest: Mapping[str, Any]) -> str:
    """A short README.md: what the artifact is and how to run it."""
    bits = manifest.get("bits_per_weight")
    method = manifest.get("method")
    facts = [
        f"- architecture: {manifest['model']['model_type']}",
        f"- activations: {manifest['dtype']}",
        f"- quantized weights: {len(manifest['layers'])}",
    ]
    if method:
        facts.append(f"- method: {method if isinstance(method, str) else json.dumps(method, sort_keys=True)}")
    if bits is not None:
        facts.append(
            f"- bits per weight: {bits:.3f}" if isinstance(bits, float) else f"- bits per weight: {bits}"
        )
    run = (
        f"qrun generate {name} --prompt 'Once upon a time'"
        if manifest["kind"] == "decoder"
        else f"qrun inspect {name}"
    )
    return "\n".join(
        [
            f"# {name}",
            "",
            "Compiled with qcompiler.",
            "",
            *facts,
            "",
            "```",
            run,
            f"qrun verify {name}",
            "```",
            "",
        ]
    )


def _expected(
    weights: Iterable[tuple[str, torch.Tensor]], names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    known = set(names)
    for name, tensor in weights:
        if name not in known:
            raise InvalidInputError(f"weight {name!r} is not used by the graph")
        yield name, tensor


def _manifest(
    info: ArtifactInfo, graph: Mapping[str, Any], tensors: TensorInfo, experts: Mapping[str, int]
) -> dict[str, Any]:
    model: dict[str, Any] = {
        "model_type": info.model_type,
        "vocab_size": info.vocab_size,
        "max_context": info.max_context,
        "position_offset": info.position_offset,
        "eos_token_ids": list(info.eos_token_ids),
    }
    if info.bos_token_id is not None:
        model["bos_token_id"] = info.bos_token_id
    used = {library for node in graph["nodes"] for library in _libraries(node["op"])}
    manifest: dict[str, Any] = {
        **info.details,
        "schema": SCHEMA,
        "kind": info.kind,
        "dtype": info.dtype,
        "model": model,
        "ops": {library: library_version(library) for library in sorted(used)},
        "layers": quantized_layers(graph, tensors, experts),
    }
    if info.compute_capability is not None:
        manifest["requires"] = {
            "compute_capability": list(info.compute_capability),
            "fallback": info.fallback,
        }
    return manifest


def _libraries(op: str) -> list[str]:
    """The op libraries that a reader needs for an op."""
    plugin = plugin_library(op)
    return [op.split(".", 1)[0], *([] if plugin is None else [plugin])]


def expert_counts(graph: fx.GraphModule) -> dict[str, int]:
    """How many experts the rows of a stored weight are divided among, by the name of its first tensor."""
    from qcompiler.kernels.formats.calls import GROUPED_LINEARS

    grouped = {getattr(torch.ops.qcompiler, name).default for name in GROUPED_LINEARS}
    counts = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in grouped:
            # The activations come first, then the first of the stored tensors.
            names = [argument.name for argument in node.target._schema.arguments]
            offsets = node.args[names.index("offsets")]
            counts[str(node.args[1].target)] = int(offsets.meta["val"].shape[0])
    return counts


def quantized_layers(
    graph: Mapping[str, Any], tensors: TensorInfo, experts: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """The manifest's `layers`, read off the graph's nodes over quantized weights: format, settings, tensors.

    Args:
        graph: The graph as JSON.
        tensors: Dtype and shape of each stored tensor.
        experts: See `expert_counts`.
    """
    from qcompiler.kernels.formats.base import TensorSpec
    from qcompiler.kernels.formats.calls import GROUPED_LINEARS, stored_weight
    from qcompiler.kernels.library import registered_ops

    def describe(argument: Any) -> TensorSpec:
        dtype, shape = tensors[argument["weight"]]
        return TensorSpec(shape, dtype)

    layers: dict[str, dict[str, Any]] = {}
    for node in graph["nodes"]:
        op = node["op"].removeprefix("qcompiler.").removesuffix(".default")
        if op not in registered_ops():
            continue
        parts = [argument.name for argument in registered_ops()[op].overload._schema.arguments]
        call = {**dict(zip(parts, node["args"], strict=False)), **node.get("kwargs", {})}
        weight = stored_weight(op, call, describe)
        if weight is None:
            continue
        stored = {part: argument["weight"] for part, argument in weight.tensors.items()}
        first = next(iter(stored.values()))
        name = first.rpartition(".")[0]
        layers[name] = {
            "name": name,
            "format": weight.spec.name,
            "spec": weight.spec.to_json(),
            "out_features": tensors[first][1][0],
            "in_features": weight.in_features,
            "tensors": stored,
        }
        if op in GROUPED_LINEARS:
            layers[name]["experts"] = (experts or {})[first]
    return list(layers.values())


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write(path: Path, data: bytes) -> FileEntry:
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older `out` is moved aside first and removed last."""
    old = out.with_name(out.name + ".old.partial")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
