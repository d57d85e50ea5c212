"""Weight shards: safetensors files written from a stream of tensors in bounded memory, always the same bytes.

Tensors are collected until a shard is full, then written sorted by alignment
and name, so that the bytes depend on the tensors and their order alone. Full
shards are written beside the collecting of the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.manifest import FileEntry
from qcompiler.runtime.tensorfile import DTYPE_NAMES

SHARD_BYTES = 256 << 20
_WRITERS = 2  # shards written, hashed and synced at a time, while the next is collected
_WRITE_BYTES = 16 << 20


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> tuple[dict[str, FileEntry], dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Write `weights-0000i-of-0000n.safetensors` into `folder`.

    Args:
        folder: Where to write; files are fsynced.
        tensors: Name and tensor, each taken once, in the order of the shards.
        shard_bytes: A shard is closed before it would grow beyond this; a larger tensor has its own.

    Returns:
        Size and digest of each file, and dtype and shape of each tensor.

    Raises:
        InvalidInputError: a name occurs twice or a dtype cannot be stored.
    """
    shards: list[tuple[Path, Future[FileEntry]]] = []
    seen: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if len(shards) >= _WRITERS:
            shards[-_WRITERS][1].result()
        path = folder / f"weights-{len(shards) + 1:05d}.safetensors"
        shards.append((path, pool.submit(write_safetensors, path, dict(pending))))
        pending.clear()
        size = 0

    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="shard") as pool:
        for name, tensor in tensors:
            if name in seen:
                raise InvalidInputError(f"tensor {name!r} is written twice")
            if tensor.dtype not in DTYPE_NAMES or tensor.is_meta:
                raise InvalidInputError(f"tensor {name!r} ({tensor.dtype}, {tensor.device}) cannot be stored")
            if pending and size + tensor.nbytes > shard_bytes:
                flush()
            seen[name] = (tensor.dtype, tuple(tensor.shape))
            pending[name] = tensor.detach().to("cpu").contiguous()
            size += tensor.nbytes
        if pending or not shards:
            flush()
    entries = {}
    for index, (path, written) in enumerate(shards, start=1):
        final = f"weights-{index:05d}-of-{len(shards):05d}.safetensors"
        entries[final] = written.result()
        path.rename(folder / final)
    return entries, seen


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], *, sync: bool = True) -> FileEntry:
    """Write contiguous CPU tensors as one safetensors file without copying them, and fsync it."""
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as f:
        for piece in (len(text).to_bytes(8, "little"), text):
            f.write(piece)
            digest.update(piece)
        for name in order:
            if tensors[name].numel() == 0:
                continue
            raw = tensors[name].reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _WRITE_BYTES):
                f.write(raw[start : start + _WRITE_BYTES])
                digest.update(raw[start : start + _WRITE_BYTES])
        f.flush()
        if sync:
            os.fsync(f.fileno())
    return FileEntry(8 + len(text) + offset, digest.hexdigest())
