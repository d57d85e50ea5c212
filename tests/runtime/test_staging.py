"""Files to a device in pieces: the bytes that are in the file, at whatever place, or an error."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.loader import load_program
from qcompiler.runtime.staging import Staging
from qcompiler.runtime.tensorfile import TensorReader

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 63, 64, 65, 64 * 8, 64 * 21 + 5])
def test_pieces_make_the_whole(tmp_path, size):
    data = os.urandom(size + 30)
    (tmp_path / "f").write_bytes(data)
    staging = Staging(CPU, block_bytes=64)
    for begin in (0, 7, 30):
        out = torch.zeros(size, dtype=torch.uint8)
        staging.read(tmp_path / "f", begin, out)
        assert bytes(out.numpy()) == data[begin : begin + size]
    staging.close()


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    (tmp_path / "f").write_bytes(bytes(1000))
    staging = Staging(CPU, block_bytes=64)
    with pytest.raises(ArtifactError, match="ends at byte 1000"):
        staging.read(tmp_path / "f", 10, torch.zeros(2000, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="cannot be read"):
        staging.read(tmp_path / "g", 0, torch.zeros(8, dtype=torch.uint8))
    out = torch.ones(900, dtype=torch.uint8)
    staging.read(tmp_path / "f", 0, out)  # it goes on working
    assert not out.any()
    staging.close()


def test_tensors_are_those_that_the_library_reads(tiny_q4):
    artifact = open_artifact(tiny_q4, verify="sizes")
    reader = artifact.tensors
    for name in reader.entries:
        staged = reader._staged(name, CPU)
        assert torch.equal(staged, reader.read(name))
        assert staged.dtype == reader.entries[name].dtype
    reader.close()


@pytest.fixture
def always_staged(monkeypatch):
    """Weights go through staging on the CPU too, in small pieces."""

    def read(self, name, device="cpu"):
        if self._staging is None:
            self._staging = Staging(torch.device(device), block_bytes=1 << 12)
        return self._staged(name, torch.device(device))

    monkeypatch.setattr(TensorReader, "read", read)


def open_files():
    folder = Path("/proc/self/fd")
    return sorted(folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("fault", ["truncated", "EIO", "gone", "interrupted", "no memory"])
def test_a_fault_while_loading_ends_threads_and_names_the_file(artifact, always_staged, monkeypatch, fault):
    opened = open_artifact(artifact, verify="sizes")
    (shard,) = artifact.glob("*.safetensors")
    threads, files = threading.active_count(), open_files()
    preadv, copy, calls = os.preadv, Staging._copy, []
    kind, words = ArtifactError, shard.name
    with monkeypatch.context() as patch:
        if fault == "truncated":
            os.truncate(shard, shard.stat().st_size // 2)
            words = f"{shard.name}: ends at byte {shard.stat().st_size}"
        elif fault == "gone":
            shard.unlink()
        elif fault == "EIO":

            def bad(file, buffers, offset):
                calls.append(offset)
                if len(calls) > 20:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return preadv(file, [buffers[0][:1000]], offset)  # the system may read less than was asked

            patch.setattr(os, "preadv", bad)
        else:
            kind, words = (KeyboardInterrupt, "stop") if fault == "interrupted" else (RuntimeError, "memory")

            def bad_copy(self, *args):
                calls.append(1)
                if len(calls) == 20:
                    raise kind(words)
                copy(self, *args)

            patch.setattr(Staging, "_copy", bad_copy)
        with pytest.raises(kind, match=words):
            load_program(opened, CPU)
    assert threading.active_count() == threads
    assert open_files() == files
    if fault in ("truncated", "gone"):
        return
    load_program(opened, CPU)  # the same artifact can be loaded once the fault is over
    for name, tensor in load_file(shard).items():
        assert torch.equal(opened.tensors.read(name), tensor)
    opened.tensors.close()
    assert threading.active_count() == threads
