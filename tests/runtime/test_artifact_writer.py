"""The writer: same bytes every time, bounded shards, all or nothing."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import fx

from qcompiler.emit import shards
from qcompiler.emit.artifact import ArtifactInfo, staging, write_artifact
from qcompiler.emit.graph_json import graph_to_json
from qcompiler.emit.shards import write_shards
from qcompiler.kernels.errors import InvalidInputError, QualityGateError, UnsupportedModelError
from qcompiler.runtime.artifact import open_artifact

INFO = ArtifactInfo("decoder", "float32", "toy", 8, 16, details={"method": "none", "bits_per_weight": 32.0})


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(8.0).reshape(2, 4))
        self.b = torch.nn.Parameter(torch.ones(2))


def lowered():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1, 4)
    w, b = graph.get_attr("w"), graph.get_attr("b")
    y = graph.call_function(torch.ops.aten.linear.default, (x, w, b))
    y.meta["val"] = torch.ones(1, 2)
    graph.output((y,))
    return fx.GraphModule(Toy(), graph)


def weights():
    toy = Toy()
    yield "b", toy.b.detach()
    yield "w", toy.w.detach()


def write(out, **options):
    return write_artifact(out, lowered(), weights(), info=INFO, files={"config.json": b"{}"}, **options)


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_same_model_gives_the_same_bytes(tmp_path):
    (tmp_path / "again").mkdir()
    first = write(tmp_path / "one")
    second = write(tmp_path / "again" / "one")
    assert bytes_of(first.path) == bytes_of(second.path)
    assert first.manifest_sha256 == second.manifest_sha256


def test_what_was_written_opens_and_holds_the_weights(tmp_path):
    written = write(tmp_path / "a", report={"seconds": 1})
    opened = open_artifact(written.path)
    assert torch.equal(opened.read("w"), Toy().w)
    assert opened.manifest.raw["method"] == "none"
    assert opened.json("report.json") == {"seconds": 1}
    assert written.nbytes == sum(p.stat().st_size for p in written.path.iterdir())
    assert "qrun generate a" in (written.path / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool]
)
def test_shards_are_safetensors_of_bounded_size(tmp_path, dtype):
    tensors = {f"t{i}": (torch.randn(10, 10) * 5).to(dtype) for i in range(7)} | {
        "scalar": torch.tensor(3).to(dtype)
    }
    size = 100 * dtype.itemsize
    entries, seen = write_shards(tmp_path, tensors.items(), shard_bytes=2 * size)
    assert sorted(entries) == [f"weights-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    loaded = {}
    for name in entries:
        part = load_file(tmp_path / name)
        assert sum(t.nbytes for t in part.values()) <= 2 * size + dtype.itemsize
        loaded.update(part)
    assert set(seen) == set(loaded) == set(tensors)
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


def test_tensors_are_taken_two_shards_ahead_of_the_disk_at_most(tmp_path, monkeypatch):
    write, written, taken = shards.write_safetensors, [], []

    def slowly(path, tensors):
        time.sleep(0.01)
        entry = write(path, tensors)
        written.append(path)
        return entry

    def stream():
        for i in range(20):
            taken.append(i - 2 * len(written))
            yield f"t{i}", torch.zeros(25)

    monkeypatch.setattr(shards, "write_safetensors", slowly)
    entries, _ = write_shards(tmp_path, stream(), shard_bytes=200)
    assert max(taken) <= 2 * (shards._WRITERS + 1)
    assert sorted(entries) == sorted(path.name for path in tmp_path.iterdir())


def test_views_and_transposes_are_stored_as_they_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    entries, _ = write_shards(tmp_path, [("t", base.t()), ("row", base[1])])
    loaded = load_file(tmp_path / next(iter(entries)))
    assert torch.equal(loaded["t"], base.t())
    assert torch.equal(loaded["row"], base[1])


def test_weights_must_match_the_graph(tmp_path):
    cases = [
        ([("w", torch.ones(2, 4))], "'b'"),
        ([*weights(), ("c", torch.ones(1))], "'c'"),
        ([*weights(), ("w", torch.ones(1))], "twice"),
        ([("w", torch.ones(2, 4, device="meta"))], "cannot be stored"),
    ]
    for given, words in cases:
        with pytest.raises(InvalidInputError, match=words):
            write_artifact(tmp_path / "a", lowered(), given, info=INFO)
        assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept_unless_overwritten(tmp_path):
    write(tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    with pytest.raises(InvalidInputError, match="overwrite"):
        write(tmp_path / "a")
    assert bytes_of(tmp_path / "a") == before
    write(tmp_path / "a", overwrite=True, report={"new": True})
    assert "report.json" in bytes_of(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_no_artifact_is_never_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.md").write_text("years of work")
    with pytest.raises(InvalidInputError, match="not an artifact"):
        write(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "thesis.md").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing_new_in_place(tmp_path, overwrite):
    if overwrite:
        write(tmp_path / "a")
    before = {p.name: bytes_of(p) for p in tmp_path.iterdir()}

    def gate(folder):
        assert (folder / "manifest.json").is_file()
        raise QualityGateError("not good enough")

    with pytest.raises(QualityGateError):
        write(tmp_path / "a", overwrite=overwrite, accept=gate)
    assert {p.name: bytes_of(p) for p in tmp_path.iterdir()} == before


def test_two_writers(tmp_path):
    with staging(tmp_path / "a") as folder:
        (folder / "README.md").write_text("first")
        with pytest.raises(InvalidInputError, match="another process"):
            write(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "first"


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "weights-00001.safetensors").write_bytes(b"half")
    write(tmp_path / "a")
    open_artifact(tmp_path / "a")


def test_a_missing_parent_folder_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match="no-such"):
        write(tmp_path / "no-such" / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="cannot be"):
        write(tmp_path / "a")


def test_disk_full_is_refused_and_cleaned_up(tmp_path, monkeypatch):
    import errno

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match="No space left"):
        write(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_files_are_named_as_an_artifact_allows(tmp_path):
    from qcompiler.kernels.errors import ArtifactError

    for name in ("../x.json", "model.py", "model.bin"):
        with pytest.raises(ArtifactError):
            write_artifact(tmp_path / "a", lowered(), weights(), info=INFO, files={name: b""})
    assert not list(tmp_path.iterdir())


def test_an_op_that_the_runtime_does_not_run_is_named():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1, 4)
    graph.output((graph.call_function(torch.ops.aten.bernoulli.default, (x,)),))
    with pytest.raises(UnsupportedModelError, match=r"bernoulli.*aten\.bernoulli\.default"):
        graph_to_json(fx.GraphModule({}, graph), kind="decoder")


def test_nodes_without_a_reader_are_left_out_and_floats_survive():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(1, 4)
    graph.call_function(torch.ops.aten.sin.default, (x,))
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, float("-inf")))
    graph.output((y,))
    raw = graph_to_json(fx.GraphModule({}, graph), kind="decoder")
    assert raw["nodes"] == [
        {"name": "mul_tensor", "op": "aten.mul.Tensor", "args": [{"ref": "x"}, {"float": "-inf"}]}
    ]
    json.dumps(raw, allow_nan=False)
