"""`qrun tune`: what is measured becomes the table that runs read; nothing is left by halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.kernels.tuning.tables import LinearConfig, linear_config, load_table, table_path, write_table
from qcompiler.kernels.tuning.tune import Gpu
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.cli import tune as cli
from qcompiler.runtime.cli.main import run

pytest.importorskip("triton", reason="candidates are those of Triton kernels")
NAME = "NVIDIA Test-200"
FAST = "gemm"


def speed(job):
    """Faked µs: the float32 units are slow, bigger tiles faster; what runs unasked is in between."""
    if job.config is None:
        return 50.0
    return (100.0 if job.config.kind != FAST else 40.0) - job.config.block_n / 16


def fake(wrong=lambda job: False, interrupt_after=None):
    timed = []

    def check(jobs):
        for job in jobs:
            yield job, (1.0 if wrong(job) else 0.001)

    def time(_case, n, k, jobs):
        for job in jobs:
            assert (job.n, job.k) == (n, k)
            if interrupt_after is not None and len(timed) == interrupt_after:
                raise KeyboardInterrupt
            timed.append(job)
            yield job, speed(job)

    return cli.Place(NAME, {"torch": "2", "triton": "3", "cuda": "13"}, Gpu(check, time))


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory):
    """Tiny-llama in 4 bits with the activations that GPUs serve."""
    pytest.importorskip("transformers")
    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import compile_model

    out = tmp_path_factory.mktemp("tune") / "tiny-bf16"
    model = str(Path(__file__).parents[2] / "examples" / "models" / "tiny-llama")
    compile_model(CompileOptions(model, "rtn", 4, out, dtype="bfloat16", device="cpu", eval_tokens=0))
    return out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder of tables, empty."""
    monkeypatch.setenv("QCOMPILER_TUNING", str(tmp_path / "tables"))
    caches = (load_table, linear_config)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "tables"
    for cache in caches:
        cache.cache_clear()


def test_the_fastest_right_configuration_is_kept_and_run(tiny_bf16, folder, monkeypatch, capsys):
    place = fake(wrong=lambda job: job.config is not None and job.config.block_n == 128)
    monkeypatch.setattr(cli, "this_gpu", lambda: place)
    assert run(["tune", str(tiny_bf16), "--tokens", "1,16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["table"] == str(table_path(NAME, folder))
    by_tokens = {key: [c for c in result["choices"] if f"/{key}/" in c["key"]] for key in ("m1", "m16")}
    assert len(by_tokens["m1"]) == len(by_tokens["m16"]) > 1  # every shape of the model once
    assert all(choice["config"] is None for choice in by_tokens["m1"])  # nothing beats what runs unasked
    for choice in by_tokens["m16"]:
        assert choice["config"]["block_n"] == 64  # 128 would be faster, and is wrong
        assert choice["wrong"] > 0
        assert choice["us"] < choice["unasked_us"] == 50.0
        _, form, shape, _, _ = choice["key"].split("/")
        bits, group = (int(part[1:]) for part in form.split("-")[1:])
        n, k = (int(part[1:]) for part in shape.split("-"))
        found = linear_config(NAME, 132, bits, group, n, k, 16, "bfloat16")
        assert found == LinearConfig(**choice["config"])


def test_an_interrupt_keeps_what_was_finished(tiny_bf16, folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, "this_gpu", fake)
    assert run(["tune", str(tiny_bf16), "--tokens", "16"]) == 0
    whole = load_table(NAME)
    table_path(NAME, folder).unlink()
    load_table.cache_clear()
    monkeypatch.setattr(cli, "this_gpu", lambda: fake(interrupt_after=25))
    assert run(["tune", str(tiny_bf16), "--tokens", "16"]) == 130
    kept = load_table(NAME)
    assert 0 < len(kept) < len(whole)
    assert kept.items() <= whole.items()
    assert [path.name for path in folder.iterdir()] == ["nvidia_test_200.json"]


def test_an_interrupt_while_the_table_is_written_leaves_the_old_one(folder, monkeypatch):
    path = table_path(NAME, folder)
    write_table(path, NAME, {"a": LinearConfig(FAST)}, {})
    before = path.read_bytes()
    write = Path.write_text

    def interrupted(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_table(path, NAME, {"b": LinearConfig(FAST)}, {})
    assert path.read_bytes() == before
    assert list(folder.iterdir()) == [path]


def test_without_a_gpu_it_is_refused(tiny_bf16, folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["tune", str(tiny_bf16)]) == 2
    assert "Run it where the model will be served" in capsys.readouterr().err
    assert not folder.exists()


def test_activations_of_32_bits_are_refused(tiny_q4, monkeypatch, capsys):
    monkeypatch.setattr(cli, "this_gpu", fake)
    assert run(["tune", str(tiny_q4)]) == 2
    assert "float32" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["", "1,x", "0", "1000000000"])
def test_numbers_of_tokens_are_checked_first(tiny_bf16, folder, tokens, capsys):
    assert run(["tune", str(tiny_bf16), "--tokens", tokens]) == 2
    assert "--tokens" in capsys.readouterr().err


def test_entries_of_the_user_go_before_those_that_ship(folder):
    gpu = "NVIDIA H100 80GB HBM3"
    shipped = load_table(gpu)
    key = next(iter(shipped))
    mine = LinearConfig("gemm", 32, 16, 1, 2, 2)
    assert mine != shipped[key]
    write_table(table_path(gpu, folder), gpu, {key: mine}, {})
    assert load_table(gpu) == {**shipped, key: mine}


def test_a_damaged_table_of_the_user_is_named(folder):
    path = table_path(NAME, folder)
    path.parent.mkdir()
    path.write_text('{"schema": 1, "entries": {"a": {"kind": "magic"}}}')
    with pytest.raises(ArtifactError, match="magic") as caught:
        load_table(NAME)
    assert str(path) in str(caught.value)
    before = path.read_text()
    with pytest.raises(ArtifactError):
        write_table(path, NAME, {}, {})
    assert path.read_text() == before


@pytest.mark.parametrize("what", ["no table", "no folder"])
def test_a_table_that_cannot_be_written_is_told_before_anything_is_measured(
    tiny_bf16, tmp_path, folder, monkeypatch, capsys, what
):
    def measured(_jobs):
        pytest.fail("it was measured first")
        yield

    monkeypatch.setattr(cli, "this_gpu", lambda: cli.Place(NAME, {}, Gpu(check=measured)))
    (tmp_path / "notes").write_text("my notes")
    output = tmp_path / "notes" if what == "no table" else tmp_path / "notes" / "table.json"
    assert run(["tune", str(tiny_bf16), "--output", str(output)]) == 2
    assert "notes" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "my notes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_tiny_run_writes_a_table_that_loads(tiny_bf16, folder, capsys):
    assert run(["tune", str(tiny_bf16), "--tokens", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(choice["us"] > 0 and choice["tried"] > 1 for choice in result["choices"])
    chosen = {choice["key"] for choice in result["choices"] if choice["config"]}
    assert set(load_table(result["gpu"])) >= chosen
    assert open_artifact(tiny_bf16).manifest.dtype == "bfloat16"
