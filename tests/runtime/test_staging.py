"""Files to a device in pieces: the bytes that are in the file, at whatever place, or an error."""

from __future__ import annotations

import os

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.staging import Staging

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
