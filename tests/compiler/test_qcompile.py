"""`qcompile` as its users meet it: what it prints, what it leaves behind, what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from qcompiler.cli.main import qcompile, run

FAST = ["--method", "rtn", "--eval-tokens", "64", "--eval-context", "32"]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            names.extend(shard.keys())
    return names


@pytest.fixture
def artifact_of(tmp_path, capsys):
    """Compile and give (exit code, stdout, stderr, output folder)."""

    def call(model, *arguments, out="out"):
        code = run(qcompile, [str(model), "-o", str(tmp_path / out), *FAST, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err, tmp_path / out

    return call


def test_json_prints_one_object_with_the_documented_keys(random_llama, artifact_of):
    code, stdout, _, out = artifact_of(random_llama, "--json", "--bits", "3")
    assert code == 0
    result = json.loads(stdout)
    assert {
        "output", "bytes", "bits_per_weight", "bits_per_weight_linears", "linears_quantized",
        "linears_skipped", "seconds", "peak_rss_bytes", "peak_gpu_bytes", "quality", "manifest_sha256",
    } <= set(result)  # fmt: skip
    assert set(result["quality"]) >= {
        "tokens", "kl_mean", "kl_se", "top1_agreement", "perplexity", "perplexity_original",
    }  # fmt: skip
    assert result["bytes"] == sum(len(data) for data in tree(out).values())
    assert result["linears_quantized"] == 14
    assert [skipped["name"] for skipped in result["linears_skipped"]] == ["lm_head"]
    assert result["bits_per_weight_linears"] == pytest.approx(
        3 + 32 / 64, abs=0.2
    )  # in_features 96: 1.5 groups


def test_the_block_at_the_end_names_size_quality_and_what_to_try(random_llama, artifact_of):
    _, stdout, _, out = artifact_of(random_llama)
    for told in (
        "bits per weight",
        "14/15 quantized",
        "peak memory",
        "KL divergence",
        "same top-1",
        "worst layers",
    ):
        assert told in stdout
    assert f"qrun generate {out}" in stdout


def test_the_output_is_named_in_the_current_folder_by_default(random_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(qcompile, [str(random_llama), *FAST, "--bits", "5", "-q"]) == 0
    assert (tmp_path / "llama-rtn-5bit" / "manifest.json").is_file()


def test_two_runs_give_the_same_bytes(random_llama, artifact_of):
    _, _, _, first = artifact_of(random_llama, out="a/same")
    _, _, _, second = artifact_of(random_llama, out="b/same")
    assert tree(first) == tree(second)


def test_patterns_and_head_bits_reach_the_layers(random_llama, artifact_of):
    code, stdout, _, _ = artifact_of(
        random_llama,
        "--json",
        "--bits",
        "2",
        "--bits",
        "o_proj=8",
        "--skip",
        "model.layers.0.mlp.*",
        "--lm-head-bits",
        "6",
    )
    assert code == 0
    bits = {layer["name"]: layer["bits"] for layer in json.loads(stdout)["layers"]}
    assert bits["model.layers.0.self_attn.o_proj"] == bits["model.layers.1.self_attn.o_proj"] == 8
    assert bits["lm_head"] == 6
    assert bits["model.layers.1.mlp.up_proj"] == 2
    assert "model.layers.0.mlp.up_proj" not in bits


def test_dry_run_reads_no_weights_and_writes_nothing(random_llama, artifact_of, monkeypatch):
    from qcompiler.checkpoint import Checkpoint

    def never(self, fqn):
        raise AssertionError(f"{fqn} was read")

    monkeypatch.setattr(Checkpoint, "tensor", never)
    code, stdout, _, out = artifact_of(random_llama, "--dry-run", "--json")
    assert code == 0
    estimate = json.loads(stdout)
    assert len(estimate["linears"]) == 14
    assert estimate["bytes"] > 0
    assert estimate["memory_bytes"] > 0
    assert estimate["seconds"] > 0
    assert list(out.parent.iterdir()) == []


def test_the_estimated_size_is_the_size_of_the_weights(random_llama, artifact_of):
    _, stdout, _, _ = artifact_of(random_llama, "--dry-run", "--json")
    estimated = json.loads(stdout)["bytes"]
    _, _, _, out = artifact_of(random_llama)
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert estimated <= weights <= estimated + 16384  # headers, rotary frequencies


def test_dump_graphs_writes_every_pass(random_llama, artifact_of, tmp_path):
    code, *_ = artifact_of(random_llama, "--dump-graphs", str(tmp_path / "graphs"))
    assert code == 0
    texts = {
        path.relative_to(tmp_path / "graphs"): path.read_text()
        for path in (tmp_path / "graphs").rglob("*.txt")
    }
    lowered = [text for path, text in sorted(texts.items()) if path.parts[0] == "3-lowered"]
    assert "linear_affine" in lowered[-1]
    assert "paged_attention" in lowered[-1]
    gated = next(text for path, text in texts.items() if path.name.endswith("fuse_gated_linears.txt"))
    assert "# saves 2 launches and " in gated


def test_fusions_can_be_left_out(random_llama, artifact_of):
    for arguments, saved in (((), True), (("--no-fuse", "--overwrite"), False)):
        _, _, _, out = artifact_of(random_llama, *arguments)
        passes = {item["name"]: item for item in json.loads((out / "report.json").read_text())["passes"]}
        assert ("fuse_rotary_append" in passes) is saved
        if saved:
            assert passes["fuse_rotary_append"]["saved"]["launches"] == 4
            assert passes["fuse_gated_linears"]["saved"]["bytes_per_token"] > 0


def test_max_kl_fails_with_3_and_keeps_nothing(random_llama, artifact_of):
    code, _, stderr, out = artifact_of(random_llama, "--bits", "2", "--max-kl", "1e-9")
    assert code == 3
    assert "--max-kl" in stderr
    assert list(out.parent.iterdir()) == []


def test_fault_19_a_killed_run_resumes_to_the_same_bytes(random_llama, artifact_of, tmp_path):
    _, _, _, unbroken = artifact_of(random_llama, out="unbroken/same")
    killed = tmp_path / "killed" / "same"
    arguments = [str(random_llama), "-o", str(killed), *FAST]
    code = f"""
import os, signal
from qcompiler.methods.rtn import RoundToNearest
original, calls = RoundToNearest.quantize, 0
def quantize(*args, **kwargs):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
RoundToNearest.quantize = quantize
from qcompiler.cli.main import main
main({arguments!r})
"""
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert died.returncode == -9
    assert not killed.exists()
    assert run(qcompile, arguments) == 2  # not thrown away unasked
    code, stdout, _, _ = artifact_of(random_llama, "--resume", "--json", out="killed/same")
    assert code == 0
    assert json.loads(stdout)["resumed_layers"] in (4, 5)  # the fifth was being written
    assert tree(killed) == tree(unbroken)
    assert [path.name for path in killed.parent.iterdir()] == ["same"]


def test_fault_20_a_full_disk_keeps_the_work_and_says_so(random_llama, artifact_of, monkeypatch):
    import qcompiler.workspace

    real, calls = qcompiler.workspace.write_safetensors, []

    def full_after_three(path, tensors, **options):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors, **options)

    monkeypatch.setattr(qcompiler.workspace, "write_safetensors", full_after_three)
    code, _, stderr, out = artifact_of(random_llama)
    assert code == 2
    assert "disk is full" in stderr
    assert "--resume" in stderr
    assert not out.exists()
    monkeypatch.setattr(qcompiler.workspace, "write_safetensors", real)
    code, stdout, _, _ = artifact_of(random_llama, "--resume", "--json")
    assert code == 0
    assert json.loads(stdout)["resumed_layers"] == 3


def test_fault_21_an_existing_output_is_kept_unless_told(random_llama, artifact_of, tmp_path):
    artifact_of(random_llama, "--bits", "4")
    before = tree(tmp_path / "out")
    code, _, stderr, out = artifact_of(random_llama, "--bits", "3")
    assert code == 2
    assert "--overwrite" in stderr
    assert tree(out) == before
    code, *_ = artifact_of(random_llama, "--bits", "3", "--overwrite")
    assert code == 0
    assert tree(out) != before


def test_fault_21_a_folder_that_is_no_artifact_is_never_overwritten(random_llama, artifact_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    code, _, stderr, out = artifact_of(random_llama, "--overwrite")
    assert code == 2
    assert "not an artifact" in stderr
    assert (out / "thesis.tex").read_text() == "years of work"


def test_fault_23_missing_memory_is_found_before_the_work(random_llama, artifact_of, monkeypatch):
    import psutil

    from qcompiler.methods.rtn import RoundToNearest

    def never(*_args, **_kwargs):
        raise AssertionError("work was begun")

    scarce = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: scarce)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: type("Info", (), {"rss": 0})())
    monkeypatch.setattr(RoundToNearest, "quantize", never)
    code, _, stderr, out = artifact_of(random_llama)
    assert code == 2
    assert "of memory" in stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bits", "7"], "7-bit"),
        (["--group-size", "48"], "group size 48"),
        (["--method", "hqqq"], "hqqq"),
        (["--lm-head-bits", "9"], "9-bit"),
        (["--bits", "o_proj=1"], "1-bit"),
        (["--skip", "o_porj"], "o_porj"),
        (["--device", "tpu"], "tpu"),
        (["--hqq-solver", "reference"], "--hqq-solver"),
        (["--resume", "--overwrite"], "contradict"),
        (["--eval-text", "no-such-file"], "no-such-file"),
    ],
)
def test_fault_24_impossible_requests_are_named_before_any_work(random_llama, artifact_of, arguments, told):
    code, stdout, stderr, out = artifact_of(random_llama, *arguments)
    assert code == 2
    assert told in stderr
    assert stdout == ""
    assert list(out.parent.iterdir()) == []


def test_fault_25_in_features_need_not_be_a_multiple_of_the_group(tmp_path, artifact_of, make_checkpoint):
    odd = make_checkpoint(
        tmp_path / "odd", intermediate_size=100, hidden_size=40, num_attention_heads=2, head_dim=20
    )
    code, stdout, _, _ = artifact_of(odd, "--json", "--bits", "8", "--group-size", "32")
    assert code == 0
    assert json.loads(stdout)["quality"]["kl_mean"] < 1e-3


def test_fault_26_tied_embeddings_are_stored_once(tmp_path, artifact_of, make_checkpoint):
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    _, _, _, out = artifact_of(tied)
    names = stored_names(out)
    assert len([name for name in names if "embed" in name or "lm_head" in name]) == 1


@pytest.mark.parametrize("model", ["someone/some-model", "./no/such/folder"])
def test_fault_27_a_model_out_of_reach_says_what_to_do(model, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "qcompiler.cli.main", model, "--bits", "4"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert ("hf download" in result.stderr) == (model == "someone/some-model")


def test_fault_29_checks_hold_under_python_O(random_llama, tmp_path):  # noqa: N802
    command = [sys.executable, "-O", "-m", "qcompiler.cli.main", str(random_llama), "--bits", "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 2
    assert "7-bit" in result.stderr


def test_the_tiny_model_that_ships_compiles(tiny_llama, artifact_of):
    code, stdout, _, out = artifact_of(tiny_llama, "--json", "--bits", "8", "--eval-tokens", "256")
    assert code == 0
    quality = json.loads(stdout)["quality"]
    assert quality["kl_mean"] < 0.01
    assert quality["perplexity"] == pytest.approx(quality["perplexity_original"], rel=0.02)
    assert "model.embed_tokens.weight" in stored_names(out) or "lm_head.weight" in stored_names(out)


def test_help_is_quick_and_names_every_option():
    result = subprocess.run(
        [sys.executable, "-m", "qcompiler.cli.main", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for option in (
        "--method",
        "--bits",
        "--dry-run",
        "--max-kl",
        "--resume",
        "--overwrite",
        "--dump-graphs",
        "--json",
    ):
        assert option in result.stdout


def test_a_runtime_only_installation_says_what_compiling_needs(tmp_path):
    code = """
import sys
sys.modules["transformers"] = None
from qcompiler.cli.main import main
main(["%s", "--bits", "4"])
"""
    command = [sys.executable, "-c", code.replace("%s", str(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "qcompiler[compile]" in result.stderr


def test_peak_memory_is_that_of_the_compiler_not_of_who_started_it():
    ballast = bytearray(600 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from qcompiler.report import peak_rss_bytes; print(peak_rss_bytes())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert 1 << 20 < int(result.stdout) < 300 << 20
    assert len(ballast) == 600 << 20
