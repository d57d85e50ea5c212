"""Safetensors files, checked by us before anything else reads them.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian
header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
data. The library checks structure when it opens a file, but accepts duplicate
names, and its limits are not ours; this parser is strict and bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.files import parse_json
from qcompiler.runtime.staging import Staging

MAX_HEADER_BYTES = 64 << 20
MAX_RANK = 8
MAX_NAME = 512

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# To a GPU through pinned memory, several threads reading; otherwise straight from the memory map.
STAGED = True
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype, shape and its bytes `[begin, end)` counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and check the header of one file.

    Checks the header's size, duplicate names, dtypes, shapes × dtype = bytes,
    and that the tensors' bytes cover the rest of the file exactly once.

    Raises:
        ArtifactError: naming the file, the tensor and the fault.
    """
    where = path.name
    size = path.stat().st_size
    with path.open("rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise ArtifactError(f"{where}: header length {length} does not fit a file of {size} bytes")
        data = f.read(length)
    header = parse_json(data, f"{where} header", max_depth=4)
    if not isinstance(header, dict):
        raise ArtifactError(f"{where}: header is not an object")
    header.pop("__metadata__", None)
    entries = {
        name: _entry(f"{where}: tensor {name[:MAX_NAME]!r}", name, raw) for name, raw in header.items()
    }
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            kind = "overlap" if entry.begin < end else "leave a gap before"
            raise ArtifactError(f"{where}: data offsets {kind} tensor {name!r} at {entry.begin}")
        end = entry.end
    if 8 + length + end != size:
        raise ArtifactError(
            f"{where}: tensors end at byte {8 + length + end} but the file has {size}",
            hint="The file is truncated or has bytes appended; copy the artifact again.",
        )
    return entries


class TensorReader:
    """Reads tensors of several checked files through the safetensors library's memory map, one at a time."""

    def __init__(self, root: Path, files: list[str]):
        self.root = root
        self.entries: dict[str, TensorEntry] = {}
        self.file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._begin: dict[str, int] = {}  # of each file's data
        self._staging: Staging | None = None
        for name in files:
            for tensor, entry in read_header(root / name).items():
                if tensor in self.entries:
                    raise ArtifactError(f"{name}: tensor {tensor!r} is also in {self.file_of[tensor]}")
                self.entries[tensor] = entry
                self.file_of[tensor] = name
                self._begin[name] = max(self._begin.get(name, 0), entry.end)
            if name in self._begin:
                self._begin[name] = (root / name).stat().st_size - self._begin[name]

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor on `device`; on the CPU it shares the memory map until it is changed or copied.

        On a GPU it is there for the work that is given to the current stream from now on.
        """
        from safetensors import SafetensorError, safe_open

        device = torch.device(device)
        if device.type == "cuda" and STAGED:
            return self._staged(name, device)
        file = self.file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.root / file, framework="pt", device="cpu")
            tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise ArtifactError(f"{file}: tensor {name!r} cannot be read: {e}") from e
        return tensor.to(device) if device.type != "cpu" else tensor

    def _staged(self, name: str, device: torch.device) -> torch.Tensor:
        if self._staging is None:
            self._staging = Staging(device)
        entry, file = self.entries[name], self.file_of[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device=device)
        if tensor.numel():
            out = tensor.view(-1).view(torch.uint8)
            self._staging.read(self.root / file, self._begin[file] + entry.begin, out)
        return tensor

    def close(self) -> None:
        """Drop the memory maps; tensors already read stay valid."""
        self._open.clear()
        if self._staging is not None:
            self._staging.close()
            self._staging = None


def _entry(where: str, name: str, raw: Any) -> TensorEntry:
    if not name or len(name) > MAX_NAME or any(ord(c) < 0x20 for c in name):
        raise ArtifactError(f"{where}: refused name")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where}: entry must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise ArtifactError(f"{where}: dtype {str(raw['dtype'])[:40]!r} is not accepted")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise ArtifactError(f"{where}: shape {str(shape)[:80]} is not a list of at most {MAX_RANK} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArtifactError(f"{where}: data_offsets {str(offsets)[:80]} are not [begin, end]")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ArtifactError(
            f"{where}: shape {shape} of {raw['dtype']} does not take {offsets[1] - offsets[0]} bytes"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)
