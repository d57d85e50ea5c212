"""Finds a checkpoint's files and reads what their headers promise, before any tensor is touched.

safetensors layout: 8 bytes little-endian header length, a JSON header of
name → {dtype, shape, data_offsets}, then the data (format owner: Hugging Face,
github.com/huggingface/safetensors). Sharded checkpoints add
`model.safetensors.index.json` with `weight_map`: name → file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qcompiler.kernels.errors import InvalidInputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MAX_HEADER = 512 << 20  # bytes; a header of a trillion-parameter checkpoint is some 10 MB
_ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: The safetensors file.
        dtype: safetensors' name of the dtype, e.g. "BF16".
        shape: Its shape.
        nbytes: Bytes of data.
        begin: Where in the file they begin.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int


def locate(model: str | Path, *, code: bool = False, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or the snapshot of a hub id.

    A string is taken for a hub id only if it is no existing path and reads like "owner/name".

    Args:
        model: Folder or hub id.
        revision: Branch, tag or commit of a hub id; the default branch if None.
        code: Also fetch the checkpoint's Python files (only for a user who trusts remote code).

    Raises:
        InvalidInputError: There is no such folder, or the hub cannot give the model; says what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InvalidInputError(
            f"{path} is a file", hint="Give the folder that holds config.json and *.safetensors."
        )
    if isinstance(model, Path) or not _HUB_ID.fullmatch(str(model)):
        raise InvalidInputError(
            f"there is no folder {str(model)!r}",
            hint="Give a local folder with config.json and *.safetensors, or a hub id like owner/name.",
        )
    return _snapshot(str(model), [*_FETCHED, "*.py"] if code else list(_FETCHED), revision)


def _snapshot(repo: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unreachable: tuple[type[Exception], ...] = (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        ConnectionError,
        *_transport_errors(),
    )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InvalidInputError(
            f"{repo} is gated: its owner must grant you access",
            hint=f"Accept its terms at https://huggingface.co/{repo}, then log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise InvalidInputError(
            f"the hub has no model {repo!r} that you may see, and there is no such folder here",
            hint="Check the spelling; for a private model log in with `hf auth login`.",
        ) from error
    except unreachable as error:
        raise InvalidInputError(
            f"{repo} is neither a local folder nor in the local hub cache, and the hub cannot be reached",
            hint=f"Go online (and unset HF_HUB_OFFLINE), or run `hf download {repo}` where "
            "there is a network and give the folder.",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InvalidInputError(f"the hub did not give {repo}: {error}", hint="Try again later.") from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub client's HTTP library, which differs by release, raises without a network."""
    found: list[type[Exception]] = []
    for module, name in (
        ("httpx", "TransportError"),
        ("httpx2", "TransportError"),
        ("requests", "ConnectionError"),
        ("requests", "Timeout"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its stored name, after checking index and headers.

    Raises:
        InvalidInputError: No safetensors, a missing or truncated shard, an index that does not match its
            shards, a name stored twice.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInputError(f"{folder} holds no *.safetensors", hint=_no_safetensors_hint(folder))
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise InvalidInputError(
                    f"tensor {name!r} is stored twice, in {found[name].file.name} and {file.name}"
                )
            found[name] = stored
    return found


def _no_safetensors_hint(folder: Path) -> str:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        return (
            f"It has {pickled[0]}, which is pickled: loading it can run code, so it is never read. "
            "Get a safetensors version of the model, or convert it where you trust the file "
            "(AutoModel.from_pretrained(folder).save_pretrained(new_folder))."
        )
    return "Expected model.safetensors, or model.safetensors.index.json with its shards."


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidInputError(f"{index.name} has no weight_map of names to files")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if PurePosixPath(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise InvalidInputError(
                f"{index.name} names the file {shard!r}, which is not in the checkpoint's folder"
            )
        file = folder / shard
        if not file.is_file():
            raise InvalidInputError(
                f"{index.name} names {shard}, which is missing from {folder}",
                hint="Download the checkpoint again.",
            )
        headers[shard] = read_header(file)
    absent = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if absent:
        raise InvalidInputError(
            f"{index.name} says that {weight_map[absent[0]]} holds {absent[0]!r}, but it does not"
            + (f" ({len(absent)} such tensors)" if len(absent) > 1 else "")
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InvalidInputError: The file is missing, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInputError(
            f"{file.parent} holds no {file.name}", hint="Is it a checkpoint's folder?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{file} is not a JSON object")
    return content


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file says it holds, checked against its size.

    Raises:
        InvalidInputError: Truncated, trailing bytes, or a header that makes no sense.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise _damaged(file, f"its header should be {length} bytes long but the file has {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, _DuplicateKeyError) as error:
        raise _damaged(file, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    found = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise _damaged(file, f"its tensors overlap or leave a gap at byte {end}")
        end = stop
    if 8 + length + end != size:
        what = "is truncated" if 8 + length + end > size else "has trailing bytes"
        raise _damaged(file, f"it {what}: {8 + length + end} bytes promised, {size} there")
    return found


class _DuplicateKeyError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise _DuplicateKeyError("a key occurs twice")
    return content


def _entry(file: Path, name: str, entry: Any, data: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _damaged(file, f"its entry for {name!r} is no object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    whole = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *offsets))
    )
    if not whole or dtype not in _ITEM_BITS:
        raise _damaged(file, f"its entry for {name!r} is malformed (dtype {dtype!r}, shape {shape!r})")
    nbytes = math.prod(shape) * _ITEM_BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(file, f"{name!r} needs {nbytes} bytes but has {offsets[1] - offsets[0]}")
    return StoredTensor(file, dtype, tuple(shape), nbytes, data + offsets[0])


def _damaged(file: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(f"{file.name} is damaged: {reason}", hint="Download the file again.")
