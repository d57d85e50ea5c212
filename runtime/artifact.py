"""Opens an artifact directory: every file is verified before anything in it is used.

Order: names and kinds of files, manifest, sizes and digests, safetensors
headers, graph, declared formats against stored tensors. Each refusal is an
`ArtifactError` that names the file and the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.files import list_directory, read_json, sha256_file
from qcompiler.runtime.graph import MAX_BYTES, MAX_DEPTH, Graph, Node, Weight, bind, decode
from qcompiler.runtime.manifest import MANIFEST, GpuRequirement, LayerEntry, Manifest, read_manifest
from qcompiler.runtime.opset import FORMAT_LIBRARY, library_version
from qcompiler.runtime.tensorfile import TensorReader

GRAPH = "graph.json"
_HASH_THREADS = 4
Verify = Literal["full", "sizes"]


class Artifact:
    """A verified artifact: `manifest`, `graph`, and its tensors through `read`."""

    def __init__(self, root: Path, manifest: Manifest, graph: Graph, tensors: TensorReader):
        self.root = root
        self.manifest = manifest
        self.graph = graph
        self.tensors = tensors
        self._checked = {
            tensor: layer.name
            for layer in manifest.layers
            for tensor in layer.tensors.values()
            if tensors.entries[tensor].dtype.is_floating_point
        }

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype."""
        return getattr(torch, self.manifest.dtype)

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor on `device`; scales and zero points must be finite.

        Raises:
            ArtifactError: the tensor cannot be read, or a scale or zero point is NaN or infinite.
        """
        tensor = self.tensors.read(name, device)
        if name in self._checked and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"{self.tensors.file_of[name]}: tensor {name!r} of layer {self._checked[name]!r} "
                "holds NaN or Inf"
            )
        return tensor

    def json(self, name: str) -> Any:
        """A JSON file of the artifact, or None if it has no such file."""
        return read_json(self.root / name) if name in self.manifest.files else None

    def path(self, name: str) -> Path | None:
        """Where a file of the artifact is, or None if it has no such file."""
        return self.root / name if name in self.manifest.files else None


def open_artifact(path: str | Path, *, verify: Verify = "full") -> Artifact:
    """Open and verify an artifact.

    Args:
        path: The directory that qcompile wrote.
        verify: "full" computes the SHA-256 of every file; "sizes" compares sizes only.

    Raises:
        ArtifactError: naming the file and what is wrong with it.
    """
    if verify not in ("full", "sizes"):
        raise InvalidInputError(f"verify must be 'full' or 'sizes', not {verify!r}")
    root = Path(path)
    present = list_directory(root)
    manifest = read_manifest(root)
    _check_files(root, manifest, present, digests=verify == "full")
    _check_op_versions(manifest)
    shards = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    tensors = TensorReader(root, shards)
    if GRAPH not in manifest.files:
        raise ArtifactError(f"{root}: no {GRAPH}")
    graph = decode(read_json(root / GRAPH, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH))
    if graph.kind != manifest.kind:
        raise ArtifactError(f"{GRAPH}: kind {graph.kind!r} is not the manifest's {manifest.kind!r}")
    _check_tensors(graph, tensors)
    for layer in manifest.layers:
        _check_layer(layer, tensors)
    for node in graph.nodes:
        if node.op.startswith("qcompiler."):
            _check_stored_weight(node, tensors)
    return Artifact(root, manifest, graph, tensors)


def check_contents(artifact: Artifact) -> Iterator[str]:
    """Read every tensor and yield its name; floating-point ones must be finite.

    Raises:
        ArtifactError: a tensor holds NaN or Inf, or cannot be read.
    """
    for name, entry in artifact.tensors.entries.items():
        tensor = artifact.read(name)
        if entry.dtype.is_floating_point and not bool(torch.isfinite(tensor.float()).all()):
            raise ArtifactError(f"{artifact.tensors.file_of[name]}: tensor {name!r} holds NaN or Inf")
        yield name


def gpu_obstacle(requirement: GpuRequirement, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run the artifact's kernels, or None."""
    needed = requirement.compute_capability
    if needed is None or capability >= needed:
        return None
    return (
        f"the artifact needs a GPU of compute capability {needed[0]}.{needed[1]} or later; "
        f"this one has {capability[0]}.{capability[1]}"
    )


def _check_files(root: Path, manifest: Manifest, present: dict[str, int], *, digests: bool) -> None:
    extra = sorted(set(present) - set(manifest.files) - {MANIFEST})
    if extra:
        raise ArtifactError(
            f"{root}: file {extra[0]!r} is not in the manifest", hint="Remove it, or copy the artifact again."
        )
    for name, entry in manifest.files.items():
        if name not in present:
            raise ArtifactError(f"{root}: file {name!r} is missing", hint="Copy the artifact again.")
        if present[name] != entry.size:
            raise ArtifactError(
                f"{name}: {present[name]} bytes, but the manifest says {entry.size}",
                hint="The file is truncated or was changed; copy the artifact again.",
            )
    if digests:
        # Hashing lets go of the interpreter lock, so several files are read at once.
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            found = dict(
                zip(manifest.files, pool.map(sha256_file, [root / n for n in manifest.files]), strict=True)
            )
        for name, entry in manifest.files.items():
            if found[name] != entry.sha256:
                raise ArtifactError(
                    f"{name}: SHA-256 differs from the manifest", hint="The file was changed; copy it again."
                )


def _check_op_versions(manifest: Manifest) -> None:
    for library, version in manifest.ops.items():
        known = library_version(library)
        if known is None and library.startswith(FORMAT_LIBRARY):
            raise ArtifactError(
                f"{MANIFEST}: needs the storage format {library.removeprefix(FORMAT_LIBRARY)[:40]!r}, "
                "which no installed package brings",
                hint="Install the package that it was compiled with.",
            )
        if known is None or version > known:
            raise ArtifactError(
                f"{MANIFEST}: needs op library {library[:40]!r} version {version}, "
                f"this runtime has {'none' if known is None else known}",
                hint="Upgrade: pip install -U qcompiler",
            )


def _check_tensors(graph: Graph, tensors: TensorReader) -> None:
    missing = sorted(set(graph.weights) - set(tensors.entries))
    if missing:
        raise ArtifactError(f"{GRAPH}: weight {missing[0]!r} is in no safetensors file")
    extra = sorted(set(tensors.entries) - set(graph.weights))
    if extra:
        raise ArtifactError(f"{tensors.file_of[extra[0]]}: tensor {extra[0]!r} is not used by the graph")


def _check_layer(layer: LayerEntry, tensors: TensorReader) -> None:
    from qcompiler.kernels.formats import expert_tensor_specs, get_format

    where = f"{MANIFEST}: layer {layer.name!r}"
    try:
        format_ = get_format(layer.format)
        specs = expert_tensor_specs(
            format_, format_.spec_from_json(layer.spec), layer.experts, layer.out_features, layer.in_features
        )
    except InvalidInputError as e:
        raise ArtifactError(f"{where}: {e.message}", hint=e.hint) from e
    except (TypeError, ValueError, LookupError) as e:
        raise ArtifactError(f"{where}: settings {layer.spec} make no sense") from e
    if set(specs) != set(layer.tensors):
        raise ArtifactError(
            f"{where}: format {layer.format!r} stores {sorted(specs)}, not {sorted(layer.tensors)}"
        )
    for part, spec in specs.items():
        name = layer.tensors[part]
        entry = tensors.entries.get(name)
        if entry is None:
            raise ArtifactError(f"{where}: tensor {name!r} is in no safetensors file")
        if entry.shape != tuple(spec.shape) or entry.dtype != spec.dtype:
            raise ArtifactError(
                f"{tensors.file_of[name]}: tensor {name!r} is {entry.dtype} {list(entry.shape)}, but "
                f"{layer.spec} of [{layer.out_features}, {layer.in_features}] needs "
                f"{spec.dtype} {list(spec.shape)}"
            )


def _check_stored_weight(node: Node, tensors: TensorReader) -> None:
    """An op's settings must fit the tensors that it reads: a kernel would read beyond them."""
    from qcompiler.kernels.formats import expert_tensor_specs, get_format
    from qcompiler.kernels.formats.base import TensorSpec
    from qcompiler.kernels.formats.calls import stored_weight

    where = f"{GRAPH}: node {node.name!r} ({node.op})"

    def describe(argument: Any) -> TensorSpec:
        if not isinstance(argument, Weight):
            raise InvalidInputError("the tensors of its weight must be weights of the artifact")
        entry = tensors.entries[argument.name]
        return TensorSpec(tuple(entry.shape), entry.dtype)

    op = node.op.removeprefix("qcompiler.").removesuffix(".default")
    try:
        weight = stored_weight(op, bind(node), describe)
        if weight is None:
            return
        found = {part: describe(argument) for part, argument in weight.tensors.items()}
        rows = next(iter(found.values())).shape
        format_, outputs = get_format(weight.spec.name), rows[0] if rows else 0
        wanted = expert_tensor_specs(format_, weight.spec, weight.experts, outputs, weight.in_features)
    except InvalidInputError as e:
        raise ArtifactError(f"{where}: {e.message}", hint=e.hint) from e
    if set(wanted) != set(found):
        raise ArtifactError(
            f"{where}: format {weight.spec.name!r} stores {sorted(wanted)}, not {sorted(found)}"
        )
    for part, spec in wanted.items():
        if found[part] != spec:
            raise ArtifactError(
                f"{where}: {part} is {found[part].dtype} {list(found[part].shape)}, but "
                f"{weight.spec.to_json()} of {weight.in_features} columns needs "
                f"{spec.dtype} {list(spec.shape)}"
            )
