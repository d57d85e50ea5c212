"""manifest.json: what an artifact is, which files it has, and which format each layer is stored in.

    {"schema": 1, "kind": "decoder", "dtype": "bfloat16",
     "model":    {"model_type", "vocab_size", "max_context", "position_offset", "eos_token_ids"},
     "ops":      {"aten": 1, "qcompiler": 3, "sym": 1},
     "requires": {"compute_capability": [9, 0], "fallback": true},
     "files":    {name: {"size", "sha256"}},
     "layers":   [{"name", "format", "spec", "out_features", "in_features", "tensors": {part: tensor},
                   "experts": how many experts the rows are divided among, where it is more than a linear}],
     "checksum": sha256 of the rest as canonical JSON, ...}

Further entries (method, source, bits per weight, producer) are for the reader's eye.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.files import check_name, read_json
from qcompiler.runtime.graph import newer_schema

MANIFEST = "manifest.json"
SCHEMA = 1
MAX_BYTES = 64 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")
_MAX_SIZE = 1 << 48
_MAX_CONTEXT = 1 << 24
_MAX_VOCAB = 1 << 24
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class LayerEntry:
    """A quantized weight: its format, the format's settings, and the tensors that hold it.

    Expert weights are one matrix of `out_features` rows, those of expert 0 first; each of the
    `experts` has an equal share of them.
    """

    name: str
    format: str
    spec: dict[str, Any]
    out_features: int
    in_features: int
    tensors: dict[str, str]
    experts: int = 1


@dataclass(frozen=True)
class ModelInfo:
    """What the engine must know about the model.

    `max_context` is in tokens; `position_offset` is the position id of the first token.
    """

    model_type: str
    vocab_size: int
    max_context: int
    position_offset: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


@dataclass(frozen=True)
class GpuRequirement:
    """Least compute capability that the artifact's kernels need; `fallback`: the CPU may serve."""

    compute_capability: tuple[int, int] | None = None
    fallback: bool = True


@dataclass(frozen=True)
class Manifest:
    """A checked manifest; `raw` is the parsed JSON."""

    kind: str
    dtype: str
    model: ModelInfo
    files: dict[str, FileEntry]
    layers: list[LayerEntry]
    ops: dict[str, int]
    requires: GpuRequirement
    raw: dict[str, Any] = field(repr=False)


def checksum(raw: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `checksum`, as canonical JSON."""
    body = {key: value for key, value in raw.items() if key != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(root: Path) -> Manifest:
    """Read and check `manifest.json` of an artifact.

    Raises:
        ArtifactError: missing, damaged, of a newer schema, or with an entry that makes no sense.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{root}: no {MANIFEST}", hint="Give the folder that qcompile wrote.")
    return parse_manifest(read_json(path, max_bytes=MAX_BYTES))


def parse_manifest(raw: Any) -> Manifest:
    """Check a parsed manifest; see `read_manifest`."""
    if not isinstance(raw, dict):
        raise ArtifactError(f"{MANIFEST}: not an object")
    if type(raw.get("schema")) is not int or raw["schema"] != SCHEMA:
        raise newer_schema(MANIFEST, raw.get("schema"), SCHEMA)
    if raw.get("checksum") != checksum(raw):
        raise ArtifactError(
            f"{MANIFEST}: checksum does not match its contents",
            hint="The manifest was damaged or edited; copy the artifact again.",
        )
    kind = raw.get("kind")
    if kind not in ("decoder", "encoder"):
        raise ArtifactError(f"{MANIFEST}: kind {str(kind)[:40]!r} is neither decoder nor encoder")
    if raw.get("dtype") not in _ACTIVATION_DTYPES:
        raise ArtifactError(f"{MANIFEST}: dtype must be one of {', '.join(_ACTIVATION_DTYPES)}")
    return Manifest(
        kind=kind,
        dtype=raw["dtype"],
        model=_model(_mapping(raw, "model")),
        files=_files(_mapping(raw, "files")),
        layers=_layers(raw.get("layers", [])),
        ops={k: _integer(v, f"ops {k[:40]!r}", 1 << 20) for k, v in _mapping(raw, "ops").items()},
        requires=_requires(raw.get("requires", {})),
        raw=raw,
    )


def _model(raw: dict[str, Any]) -> ModelInfo:
    eos = raw.get("eos_token_ids", [])
    if not isinstance(eos, list) or len(eos) > 256:
        raise ArtifactError(f"{MANIFEST}: eos_token_ids must be a short list")
    model_type = raw.get("model_type", "")
    if not isinstance(model_type, str) or len(model_type) > 100:
        raise ArtifactError(f"{MANIFEST}: model_type must be a name")
    bos = raw.get("bos_token_id")
    return ModelInfo(
        model_type=model_type,
        vocab_size=_integer(raw.get("vocab_size"), "vocab_size", _MAX_VOCAB, least=1),
        max_context=_integer(raw.get("max_context"), "max_context", _MAX_CONTEXT, least=1),
        position_offset=_integer(raw.get("position_offset", 0), "position_offset", 1 << 16),
        eos_token_ids=tuple(_integer(t, "eos_token_ids", _MAX_VOCAB) for t in eos),
        bos_token_id=None if bos is None else _integer(bos, "bos_token_id", _MAX_VOCAB),
    )


def _files(raw: dict[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, entry in raw.items():
        check_name(name, MANIFEST)
        if name == MANIFEST or not isinstance(entry, dict):
            raise ArtifactError(f"{MANIFEST}: entry for file {name!r} makes no sense")
        digest = entry.get("sha256")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ArtifactError(f"{MANIFEST}: {name}: sha256 is not 64 hex digits")
        files[name] = FileEntry(_integer(entry.get("size"), f"size of {name}", _MAX_SIZE), digest)
    return files


def _layers(raw: Any) -> list[LayerEntry]:
    if not isinstance(raw, list):
        raise ArtifactError(f"{MANIFEST}: layers must be a list")
    layers = []
    for entry in raw:
        if not isinstance(entry, dict):
            raise ArtifactError(f"{MANIFEST}: a layer is not an object")
        name, tensors, spec = entry.get("name"), entry.get("tensors"), entry.get("spec")
        if (
            not isinstance(name, str)
            or not isinstance(entry.get("format"), str)
            or not isinstance(spec, dict)
        ):
            raise ArtifactError(f"{MANIFEST}: layer {str(name)[:80]!r} lacks its name, format or spec")
        if not isinstance(tensors, dict) or not all(isinstance(t, str) for t in tensors.values()):
            raise ArtifactError(f"{MANIFEST}: layer {name[:80]!r}: tensors must map parts to tensor names")
        layers.append(
            LayerEntry(
                name=name,
                format=entry["format"],
                spec=spec,
                out_features=_integer(
                    entry.get("out_features"), f"out_features of {name}", _MAX_SIZE, least=1
                ),
                in_features=_integer(entry.get("in_features"), f"in_features of {name}", _MAX_SIZE, least=1),
                tensors=tensors,
                experts=_integer(entry.get("experts", 1), f"experts of {name}", _MAX_EXPERTS, least=1),
            )
        )
    return layers


def _requires(raw: Any) -> GpuRequirement:
    if not isinstance(raw, dict):
        raise ArtifactError(f"{MANIFEST}: requires must be an object")
    capability = raw.get("compute_capability")
    if capability is not None:
        if not isinstance(capability, list) or len(capability) != 2:
            raise ArtifactError(f"{MANIFEST}: compute_capability must be [major, minor]")
        capability = tuple(_integer(c, "compute_capability", 1000) for c in capability)
    return GpuRequirement(capability, raw.get("fallback", True) is True)


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise ArtifactError(f"{MANIFEST}: {key} must be an object")
    return value


def _integer(value: Any, what: str, most: int, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ArtifactError(
            f"{MANIFEST}: {what[:120]} is {str(value)[:40]!r}, not a number in [{least}, {most}]"
        )
    return value
