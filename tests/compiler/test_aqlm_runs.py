"""AQLM as it is run: killed and resumed, around experts, with 16-bit codes; its sums, its time foretold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompiler.calibration import CalibrationSettings, calibrate
from qcompiler.capture import ModelSource, capture
from qcompiler.capture.matrix import SUPPORTED, eager_model
from qcompiler.cli.main import qcompile, run
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec
from qcompiler.methods.aqlm.cost import Rates, block_seconds
from qcompiler.methods.aqlm.finetune import FinetuneSettings
from qcompiler.methods.aqlm.layer import LayerSettings
from qcompiler.methods.aqlm.phases import PHASES
from qcompiler.methods.aqlm.search import smallest
from qcompiler.methods.aqlm.sums import CodewordSums, sums_of, tunable_sum
from qcompiler.methods.base import get_method
from qcompiler.runtime.artifact import open_artifact

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
QUICK = {"beam": 1, "rounds": 1, "epochs": 1}
TEXT = [(7 * i * i + 3 * i) % 64 for i in range(600)]


@pytest.mark.parametrize(("points", "codewords"), [(1, 1), (3000, 2), (5000, 40), (100, 4096)])
def test_sums_in_runs_are_those_of_index_add(points, codewords):
    torch.manual_seed(0)
    index = torch.randint(codewords, (points,)).square() % codewords  # unevenly, some never
    values = torch.randn(points, 8)
    wanted = torch.zeros(codewords, 8).index_add_(0, index, values)
    found = CodewordSums(index, codewords, in_runs=True)(values)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(CodewordSums(index, codewords)(values), wanted)


@pytest.mark.parametrize("columns", [3, 256, 2048, 3000, 65536])
def test_the_smallest_value_of_a_row_is_found_run_by_run(columns):
    values = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smallest(values), values.argmin(1))


def test_a_sum_of_codewords_has_the_gradient_of_look_ups():
    torch.manual_seed(0)
    codes, pull = torch.randint(16, (6, 5, 3)), torch.randn(6, 5, 8)
    books, again = (torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    (tunable_sum(books.requires_grad_(), codes, sums_of(codes, 16)) * pull).sum().backward()
    total = sum(torch.nn.functional.embedding(codes[..., m], again.requires_grad_()[m]) for m in range(3))
    (total * pull).sum().backward()
    torch.testing.assert_close(books.grad, again.grad)


KILLED_IN_BLOCK_3 = """
import os, signal, sys
from qcompiler.cli.main import qcompile, run
from qcompiler.methods.aqlm import AQLM

quantize = AQLM.quantize_block

def dies(self, task):
    if task.name == "model.layers.3":
        os.kill(os.getpid(), signal.SIGKILL)
    return quantize(self, task)

AQLM.quantize_block = dies
run(qcompile, sys.argv[1:])
"""


def test_a_run_killed_in_block_3_resumes_at_block_3(tmp_path, monkeypatch):
    seen = []
    quantize = type(get_method("aqlm")).quantize_block
    monkeypatch.setattr(
        type(get_method("aqlm")),
        "quantize_block",
        lambda self, task: seen.append(task.name) or quantize(self, task),
    )
    flags = [
        str(TINY), "--method", "aqlm", "--scheme", "1x4", "--beam", "1", "--option", "rounds=1",
        "--option", "epochs=1", "--calib-tokens", "128", "--eval-context", "64", "--eval-tokens", "0", "-q",
    ]  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(qcompile, [*flags, "-o", str(whole)]) == 0
    assert seen == [f"model.layers.{i}" for i in range(4)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_BLOCK_3, *flags, "-o", str(resumed)],
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -9
    assert not resumed.exists()
    seen.clear()
    assert run(qcompile, [*flags, "-o", str(resumed), "--resume"]) == 0
    assert seen == ["model.layers.3"]
    # All but the model card, which names the folder.
    files = [
        {
            name: entry.sha256
            for name, entry in open_artifact(path).manifest.files.items()
            if name != "README.md"
        }
        for path in (whole, resumed)
    ]
    assert files[0] == files[1]


def test_codes_of_16_bits_fit_a_trained_block():
    source = ModelSource.from_pretrained(TINY)
    gm = capture(source, torch.float32).graph
    load, spec = source.checkpoint.tensor, AdditiveSpec(1, 16)

    name = "model.layers.2.self_attn.k_proj"

    def choose(layer, out_features, in_features):
        return spec if layer == name else "kept"

    settings = CalibrationSettings(64, 128)
    outcome = calibrate(gm, load, TEXT, get_method("aqlm"), choose, settings, options={**QUICK, "epochs": 0})
    weight = load(f"{name}.weight").float()
    found = ADDITIVE.dequantize(spec, outcome.tensors(name), weight.shape[1], torch.float32)
    # More codewords than groups: each group finds its own, and half precision is all that is lost; what
    # is left to fit is that block 2 sees what the original model gives it.
    assert outcome.blocks["model.layers.2"]["layer_error"][name] < 1e-4
    assert (found - weight).norm() < 1e-2 * weight.norm()


def test_a_mixture_of_experts_is_tuned_around_its_experts():
    family = next(row for row in SUPPORTED if row.name == "qwen3_moe")
    source = ModelSource.from_config(family.config())
    weights = eager_model(source).float().state_dict()
    outcome = calibrate(
        capture(source, torch.float32).graph,
        weights.__getitem__,
        TEXT,
        get_method("aqlm"),
        lambda name, *_: AdditiveSpec(1, 4),
        CalibrationSettings(32, 128),
        options=QUICK,
    )
    assert len(outcome.blocks) == 2
    for figures in outcome.blocks.values():
        assert figures["error"] < figures["error_before"]
        assert set(figures["phases"]) == set(PHASES)


def test_a_dry_run_foretells_the_time_of_calibration(capsys):
    def seconds(*flags):
        command = [str(TINY), "--method", "aqlm", "--bits", "2", "--dry-run", "--json", *flags]
        assert run(qcompile, command) == 0
        return json.loads(capsys.readouterr().out)

    few, many = seconds("--calib-tokens", "1024"), seconds("--calib-tokens", "65536")
    assert set(few["phases"]) == set(PHASES)
    assert few["seconds"] >= sum(few["phases"].values()) > 0
    # What follows the text grows with it, what follows the weights does not.
    assert many["phases"]["tuning"] > 10 * few["phases"]["tuning"]
    assert many["phases"]["codes"] < 5 * few["phases"]["codes"]


def test_the_work_of_a_block_is_counted_from_its_shapes():
    def work(stages, rounds=4, windows=8, **rates):
        nothing = dict.fromkeys(Rates.__dataclass_fields__, 0.0)
        rate = Rates(**{**nothing, **rates})
        settings = LayerSettings(rounds=rounds)
        return block_seconds(stages, lambda _: rate, settings, FinetuneSettings(epochs=2), windows, 64)

    spec = AdditiveSpec(2, 8)
    square, wide = [[(64, 64, spec)]], [[(128, 64, spec)]]
    assert work(wide, row=1.0)["codes"] == 2 * work(square, row=1.0)["codes"]
    assert work(wide, step=1.0)["codes"] == work(square, step=1.0)["codes"]
    assert work(square, rounds=4, row=1.0)["codes"] == pytest.approx(
        5 / 3 * work(square, 2, row=1.0)["codes"]
    )
    assert work(square, windows=16, flop=1.0)["moments"] == 2 * work(square, flop=1.0)["moments"]
    # Inputs that are shared are measured once.
    assert work([[*square[0], *square[0]]], flop=1.0)["moments"] == work(square, flop=1.0)["moments"]
    assert work([*square, *square], flop=1.0)["moments"] > 2 * work(square, flop=1.0)["moments"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scheme", ["2x6", "1x12"])
def test_a_block_on_a_gpu_is_as_good_as_on_a_cpu_and_the_same_every_time(scheme):
    source = ModelSource.from_pretrained(TINY)
    gm = capture(source, torch.float32).graph
    spec = AdditiveSpec.parse(scheme)

    def fitted(device):
        return calibrate(
            gm,
            source.checkpoint.tensor,
            TEXT,
            get_method("aqlm"),
            lambda name, *_: spec if name.startswith("model.layers.1.") else "kept",
            CalibrationSettings(64, 512),
            options={"beam": 4, "rounds": 2, "epochs": 2, "code_updates": 1},
            device=device,
        )

    on_cpu, on_gpu, again = (fitted(device) for device in ("cpu", "cuda", "cuda"))
    figures = [outcome.blocks["model.layers.1"] for outcome in (on_cpu, on_gpu)]
    assert figures[1]["error"] == pytest.approx(figures[0]["error"], rel=0.1)
    for name in on_gpu.specs:
        found, repeated = on_gpu.tensors(name), again.tensors(name)
        assert all(torch.equal(tensor, repeated[part]) for part, tensor in found.items())
