"""The benchmarks run where there is a GPU; that they still fit the code they measure is seen anywhere."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MODULES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "benchmarks").glob("*.py") if p.stem != "clients"
)


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_can_be_imported(module):
    importlib.import_module(f"benchmarks.{module}")


@pytest.mark.parametrize("name", ["b4-g64", "nf4", "eetq", "llm-int8", "aqlm-2x8", "tail-b3-f0.005"])
def test_every_case_of_the_linears_has_a_key_and_configurations(name):
    cases = importlib.import_module("qcompiler.kernels.tuning.linear_cases")
    case = cases.parse_case(name)
    for tokens in (1, 16, 2048):
        tried = cases.candidates(case, tokens, 4096, 14336, thorough=False)
        assert len(set(tried)) == len(tried)
        assert bool(tried) == (case.key(4096, 14336, tokens) is not None)


def commands():
    from benchmarks.registry import BENCHMARKS

    return [command for benchmark in BENCHMARKS for command in benchmark.commands("results", "work")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[1:4]))
def test_usual_arguments_are_accepted_and_write_into_the_results(command):
    module = importlib.import_module(command[1])
    options = module.parse_arguments(command[2:])
    assert options.output.parent.name == "results"


def test_the_list_and_the_commands_are_shown(capsys):
    from benchmarks.__main__ import main
    from benchmarks.registry import BENCHMARKS

    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [benchmark.name for benchmark in BENCHMARKS]
    assert main(["--all", "--show", "--results", "elsewhere"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(commands())
    assert all(line.startswith("$ python -m benchmarks.") and "elsewhere/" in line for line in shown)
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])


def test_rows_are_kept_by_key_and_other_machines_refused(tmp_path):
    from benchmarks.record import Record

    path = tmp_path / "deep" / "rows.json"
    first = Record(path, {"gpu": "A", "torch": "2", "triton": "3"})
    first.add("x", {"us": 1})
    first.add("y", {"us": 2})
    second = Record(path, {"gpu": "A", "torch": "2", "triton": "3"})
    assert "x" in second
    second.add("x", {"us": 3})
    held = json.loads(path.read_text())
    assert {row["key"]: (row["us"], row["run"]) for row in held["rows"]} == {"x": (3, 1), "y": (2, 0)}
    second.add("y", {"us": 4})  # of the first run nothing is left
    held = json.loads(path.read_text())
    assert [row["run"] for row in held["rows"]] == [0, 0]
    assert len(held["runs"]) == 1
    with pytest.raises(SystemExit, match="gpu A, this is B"):
        Record(path, {"gpu": "B", "torch": "2", "triton": "3"})


@pytest.mark.parametrize("variant", ["bf16", "affine-3", "nf4", "aqlm-2x8", "tail-3"])
def test_a_model_without_a_checkpoint_generates(variant, toy):
    import torch

    from benchmarks.synthetic import VARIANTS, SyntheticArtifact
    from qcompiler.runtime.model import load_opened

    heads = 8 if variant == "affine-3" else None
    made = SyntheticArtifact(*toy, VARIANTS[variant], torch.device("cpu"), lm_head_bits=heads)
    model = load_opened(made, "cpu", max_sequences=1, max_cache_tokens=64)
    assert len(model.generate_tokens([1, 2, 3], max_tokens=4, ignore_eos=True).token_ids) == 4
    linears = [node.op.split(".")[1] for node in made.graph.nodes if node.op.startswith("qcompiler.linear_")]
    assert len({op.removesuffix("_gated") for op in linears}) == (variant != "bf16")
    plain = sum(node.op.startswith("aten.linear") for node in made.graph.nodes)
    assert plain == (0 if heads else 1 if variant != "bf16" else 9)  # the head; fused, four a layer


@pytest.fixture(scope="module")
def toy():
    pytest.importorskip("transformers")
    from benchmarks.synthetic import captured_llama

    return captured_llama("toy")


def test_whole_models_are_measured_row_by_row(tmp_path, capsys):
    pytest.importorskip("transformers")
    from benchmarks import model, tables

    path = tmp_path / "model.json"
    sizes = (
        "--shape toy --device cpu --batches 1 2 --prompts 40 --decode-prompt 8 --decode-tokens 3 --repeats 1"
    )
    base = [*sizes.split(), "--peers", "--output", str(path)]
    assert model.main([*base, "--variants", "bf16"]) == 0
    before = path.read_text()
    assert model.main([*base, "--variants", "bf16", "eetq", "--resume"]) == 0
    held = json.loads(path.read_text())
    first, second = held["rows"]
    assert first == json.loads(before)["rows"][0]  # not measured again
    assert second["label"] == "eetq: 8 bit"
    for row in held["rows"]:
        assert all(row["decode"][batch]["tokens_per_second"] > 0 for batch in ("1", "2"))
        assert row["prefill"]["40"]["seconds"] > 0
    table = tables.model(held)
    assert table.count("\n| ") == 4  # head, rule and two rows


def test_a_synthetic_checkpoint_is_what_others_read(tmp_path):
    pytest.importorskip("transformers")
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from benchmarks.checkpoint import make_checkpoint

    folder = tmp_path / "toy"
    largest = make_checkpoint("toy", folder, layers=1)
    assert largest == 2 * 512 * 128
    names = [name for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert len(names) == len(set(names)) == 9 + 3
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().float()
    assert 0.019 < float(weight.std()) < 0.021
    assert bool((model.model.norm.weight == 1).all())


def test_a_plot_that_shows_other_figures_is_stale(tmp_path):
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    from benchmarks.plots import Plot, is_current

    plot = Plot("speed", "Speed", "tokens", "times", {"a": [(1, 2.0), (16, 1.5)]}, reference=1.0)
    assert not is_current(plot, tmp_path)
    plot.draw(tmp_path / "speed.svg")
    assert is_current(plot, tmp_path)
    assert not is_current(replace(plot, series={"a": [(1, 2.0), (16, 1.6)]}), tmp_path)
