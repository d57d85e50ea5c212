"""Bytes of files to a GPU: threads read pieces into pinned memory while others are copied from it.

A plain copy from a memory map goes page by page through the driver's own buffer, one thread and one
piece at a time.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from qcompiler.kernels.errors import ArtifactError

_BLOCK_BYTES = 8 << 20
_BLOCKS = 8
_THREADS = 4


class Staging:
    """Pinned blocks and the threads that fill them.

    Args:
        device: Where the bytes go.
        block_bytes: Size of a piece.
    """

    def __init__(self, device: torch.device, block_bytes: int = _BLOCK_BYTES):
        self._device = device
        pinned = device.type == "cuda"
        self._block_bytes = block_bytes
        self._blocks = [
            torch.empty(block_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BLOCKS)
        ]
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(_BLOCKS)]
        self._pool = ThreadPoolExecutor(_THREADS)
        self._next = 0

    def read(self, path: Path, begin: int, out: torch.Tensor) -> None:
        """Bytes from `begin` on into `out` [bytes] uint8 on the device; copies may still run on its stream.

        Raises:
            ArtifactError: the file ends too early or cannot be read.
        """
        reads: deque[tuple[int, int, int, Future[None]]] = deque()
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise ArtifactError(f"{path.name}: cannot be read: {e.strerror}") from e
        try:
            for start in range(0, out.numel(), self._block_bytes):
                if len(reads) == _BLOCKS:
                    self._copy(*reads.popleft(), out)
                index, self._next = self._next, (self._next + 1) % _BLOCKS
                size = min(self._block_bytes, out.numel() - start)
                reads.append((
                    index, start, size, self._pool.submit(self._fill, index, file, begin + start, size, path)
                ))  # fmt: skip
            while reads:
                self._copy(*reads.popleft(), out)
        finally:
            for *_, read in reads:
                read.cancel()
            for *_, read in reads:
                if not read.cancelled():
                    read.exception()  # none may read from the file once it is closed
            os.close(file)

    def _fill(self, index: int, file: int, begin: int, size: int, path: Path) -> None:
        event = self._copied[index]
        if event is not None:
            event.synchronize()
        view = self._blocks[index].numpy().data[:size]
        while view:
            try:
                count = os.preadv(file, [view], begin)
            except OSError as e:
                raise ArtifactError(f"{path.name}: cannot be read: {e.strerror}") from e
            if count == 0:
                end = os.fstat(file).st_size
                raise ArtifactError(
                    f"{path.name}: ends at byte {end}, but has to have {begin + len(view)}",
                    hint="Copy the artifact again.",
                )
            view, begin = view[count:], begin + count

    def _copy(self, index: int, start: int, size: int, read: Future[None], out: torch.Tensor) -> None:
        read.result()
        out[start : start + size].copy_(self._blocks[index][:size], non_blocking=True)
        event = self._copied[index]
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """End the threads and give the memory back, once the last copy is done."""
        self._pool.shutdown()
        for event in self._copied:
            if event is not None:
                event.synchronize()
        self._blocks.clear()
