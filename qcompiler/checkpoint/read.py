"""Reads one stored tensor into memory of its own, large ones by several reads at once.

A mapped file is read as its pages are touched, a few at a time and by one thread, which leaves a fast disk
waiting; several large reads keep it busy, and they run beside whatever else the process does.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qcompiler.checkpoint.files import StoredTensor
from qcompiler.kernels.errors import InvalidInputError

_READERS = 4
_PIECE_BYTES = 16 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def read_tensor(name: str, stored: StoredTensor) -> torch.Tensor:
    """The tensor, on the CPU, in the dtype it is stored in.

    Raises:
        InvalidInputError: The file cannot be read, or has become shorter since its header was checked.
    """
    try:
        if stored.dtype not in _DTYPES or stored.nbytes == 0:
            with safe_open(stored.file, framework="pt", device="cpu") as mapped:
                return mapped.get_tensor(name)
        return _read(stored)
    except (SafetensorError, OSError, EOFError) as error:
        raise InvalidInputError(
            f"{stored.file.name} cannot be read: {error}", hint="Download the file again."
        ) from error


def read_soon(files: Iterable[Path], limit: int) -> None:
    """Ask the system to have up to `limit` bytes of files in its page cache soon; returns at once.

    This takes no memory that others want, and is only advice: the reads proper tell what is wrong.
    """
    threading.Thread(target=_advise, args=(list(files), limit), name="read-soon", daemon=True).start()


def _advise(files: list[Path], limit: int) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                size = min(limit, os.fstat(descriptor).st_size)
                for start in range(0, size, _PIECE_BYTES):
                    os.posix_fadvise(descriptor, start, _PIECE_BYTES, os.POSIX_FADV_WILLNEED)
                limit -= size
            finally:
                os.close(descriptor)
        if limit <= 0:
            return


def _read(stored: StoredTensor) -> torch.Tensor:
    target = torch.empty(stored.nbytes, dtype=torch.uint8)
    memory = target.numpy().data
    descriptor = os.open(stored.file, os.O_RDONLY)
    try:
        starts = range(0, stored.nbytes, _PIECE_BYTES)

        def piece(start: int) -> None:
            _fill(descriptor, memory[start : start + _PIECE_BYTES], stored.begin + start)

        if len(starts) == 1:
            piece(0)
        else:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="read") as pool:
                list(pool.map(piece, starts))
    finally:
        os.close(descriptor)
    return target.view(_DTYPES[stored.dtype]).reshape(stored.shape)


def _fill(descriptor: int, memory: memoryview, position: int) -> None:
    while memory:
        count = os.preadv(descriptor, [memory], position)
        if count == 0:
            raise EOFError("it ends before its header says")
        memory, position = memory[count:], position + count
