"""Targets: what a choice costs, the exact optimum, and the road through `qcompile`."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
import torch

from qcompiler.allocation import sensitivity
from qcompiler.allocation.candidates import groups_of, pool
from qcompiler.allocation.fisher import observe
from qcompiler.allocation.method import Auto
from qcompiler.allocation.sensitivity import measure
from qcompiler.allocation.solve import Choice, pareto, solve
from qcompiler.calibration import CalibrationSettings, calibrate
from qcompiler.calibration.blocks import run_nodes
from qcompiler.cli.main import qcompile, run
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AdditiveSpec, AffineSpec, Int8ChannelSpec, Lut4Spec
from qcompiler.options import CompileOptions, parse_size
from qcompiler.pipeline import compile_model
from qcompiler.plan import make_plan, plan_layers
from qcompiler.progress import Progress
from qcompiler.runtime.model import load
from qcompiler.workspace import Workspace

LAYER = "model.layers.{}.{}"
FAST = ["--eval-tokens", "64", "--eval-context", "32", "--calib-tokens", "64", "-q"]


@pytest.fixture(scope="module")
def plan(random_llama):
    return make_plan(CompileOptions(str(random_llama), method="auto", target_bpw=4.0, device="cpu"))


def random_groups(generator: random.Random) -> list[list[Choice]]:
    groups = []
    for _ in range(generator.randint(1, 6)):
        count = generator.randint(1, 5)
        groups.append(
            [
                Choice(
                    generator.randint(1, 60) * 16, generator.choice([1e-6, 1.0, 100.0]) * generator.random()
                )
                for _ in range(count)
            ]
        )
    return groups


def test_the_solver_finds_what_trying_everything_finds():
    generator = random.Random(0)
    for _ in range(60):
        groups = random_groups(generator)
        every = list(itertools.product(*groups))
        smallest = min(sum(c.nbytes for c in picked) for picked in every)
        budget = smallest + generator.randint(0, 900)
        chosen = [group[index] for group, index in zip(groups, solve(groups, budget), strict=True)]
        best = min(sum(c.cost for c in picked) for picked in every if sum(c.nbytes for c in picked) <= budget)
        assert sum(c.nbytes for c in chosen) <= budget
        assert sum(c.cost for c in chosen) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_a_budget_below_the_smallest_choices_is_refused_and_dominated_choices_are_dropped():
    choices = [Choice(30, 1.0), Choice(10, 2.0), Choice(40, 1.0), Choice(20, 2.5), Choice(50, 0.5)]
    assert pareto(choices) == [1, 0, 4]
    with pytest.raises(InvalidInputError, match="20 bytes, 19 are allowed"):
        solve([choices, choices], 19)
    assert solve([choices, choices], 20) == [1, 1]


def test_siblings_share_a_group_and_what_the_user_fixed_is_left_out(random_llama):
    options = CompileOptions(
        str(random_llama), method="auto", target_bpw=4.0, device="cpu", lm_head_bits=8,
        embedding_bits=8, bits_overrides=(("layers.1.mlp.down_proj", 6),),
    )  # fmt: skip
    groups = [[layer.name for layer in group.layers] for group in groups_of(make_plan(options))]
    first = [
        [LAYER.format(0, f"self_attn.{x}_proj") for x in "qkv"],
        [LAYER.format(0, "self_attn.o_proj")],
        [LAYER.format(0, "mlp.gate_proj"), LAYER.format(0, "mlp.up_proj")],
        [LAYER.format(0, "mlp.down_proj")],
    ]
    assert groups[:4] == first
    assert len(groups) == 7
    assert not any("layers.1.mlp.down_proj" in name or "head" in name for group in groups for name in group)


def test_the_pool_follows_method_group_size_and_sensitivity(plan):
    labels = [candidate.label for candidate in pool(plan.options, calibrated=True)]
    assert {"gptq 3 g128", "bnb nf4 g64", "eetq 8", "aqlm 2x8 g8"} <= set(labels)
    assert len(labels) == len(set(labels))
    data_free = pool(plan.options, calibrated=False)
    assert {candidate.method for candidate in data_free} == {"hqq", "bnb", "eetq"}
    only = CompileOptions("m", method="rtn", target_bpw=4.0, group_size=32)
    assert [c.label for c in pool(only, calibrated=True)] == [f"rtn {b} g32" for b in (2, 3, 4, 5, 6, 8)]
    with pytest.raises(InvalidInputError, match="one way"):
        pool(CompileOptions("m", method="eetq", target_bpw=8.0), calibrated=True)


def test_predicted_costs_are_the_measured_kl_of_small_changes(tiny_llama):
    """Each linear of the trained model in turn gets a little noise; KL is measured with and without."""
    plan = make_plan(CompileOptions(str(tiny_llama), method="auto", target_bpw=4.0, device="cpu"))
    graph = plan.captured.graph
    generator = torch.Generator().manual_seed(0)
    windows = list(torch.tensor(_tokens(plan)).reshape(4, 1, 128))
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    ids, positions = (node for node in graph.graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    logits = output.all_input_nodes[0]
    weights = {name: plan.checkpoint.tensor(name).float() for name in _parameters(graph, plan)}

    def log_p(changed):
        found = []
        for window in windows:
            given = {ids: window, positions: torch.arange(128)[None]}
            held = {**weights, **changed}
            values = run_nodes(
                nodes, given, lambda name, held=held: held.get(name, _constant(graph, name)), [logits],
                dtypes={torch.bfloat16: torch.float32},
            )  # fmt: skip
            found.append(torch.log_softmax(values[logits].flatten(0, -2), -1))
        return torch.cat(found)

    wanted = frozenset(
        LAYER.format(i, name) for i in (0, 3) for name in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    )
    with torch.no_grad():
        before = log_p({})
    ratios = []
    for _, linears in observe(graph, plan.checkpoint.tensor, windows, wanted, device=torch.device("cpu")):
        for seen in linears:
            noise = torch.randn(seen.weight.shape, generator=generator) * seen.weight.std() * 0.05
            with torch.no_grad():
                after = log_p({seen.linear.weight: seen.weight + noise})
                kl = (before.exp() * (before - after)).sum(-1).mean()
            ratios.append(seen.cost(seen.weight + noise) / float(kl))
    assert len(ratios) == len(wanted)
    # One drawn label per position, and tokens taken one by one: right to some tens of percent.
    assert all(0.6 < ratio < 1.5 for ratio in ratios), ratios


def _tokens(plan):
    from qcompiler.texts import text_tokens

    return text_tokens(plan, None, "calib", 512).tolist()


def _parameters(graph, plan):
    held = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return [name for name in held if _constant(graph, name).is_meta]


def _constant(graph, name):
    module, _, leaf = name.rpartition(".")
    return getattr(graph.get_submodule(module), leaf)


def test_one_block_may_mix_every_format(plan):
    specs = {
        "q_proj": AffineSpec(4, 32), "k_proj": AffineSpec(4, 32), "v_proj": AffineSpec(4, 32),
        "o_proj": Int8ChannelSpec(), "gate_proj": AdditiveSpec(1, 6, 8), "up_proj": AdditiveSpec(1, 6, 8),
        "down_proj": Lut4Spec(),
    }  # fmt: skip
    outcome = calibrate(
        plan.captured.graph,
        plan.checkpoint.tensor,
        [(7 * i * i + 3 * i) % 2048 for i in range(64)],
        Auto(),
        lambda name, *_: specs[name.rpartition(".")[2]],
        CalibrationSettings(context=32, tokens=64),
        options={"epochs": 1},
    )
    assert len(outcome.specs) == 14
    assert {spec.name for spec in outcome.specs.values()} == {"affine", "lut4", "int8_channel", "additive"}
    assert all(spec == specs[name.rpartition(".")[2]] for name, spec in outcome.specs.items())


def test_plan_layers_gives_each_layer_the_format_decided_for_it(plan):
    name = LAYER.format(0, "self_attn.o_proj")
    planned = plan_layers(plan, {name: Int8ChannelSpec()})
    found = {layer.name: layer.spec for layer in planned.layers}
    assert found[name] == Int8ChannelSpec()
    assert found[LAYER.format(1, "self_attn.o_proj")] == AffineSpec(4, 64)


def compiled(capsys, model, out, *arguments):
    code = run(qcompile, [str(model), "-o", str(out), *FAST, "--json", *arguments])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 else printed.err


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def at_four_bits(random_llama, tmp_path_factory):
    """(report, artifact, plot) of one compilation for 4 bits per weight."""
    folder = tmp_path_factory.mktemp("target")
    options = CompileOptions(
        str(random_llama), method="gptq", target_bpw=4.0, output=folder / "out", eval_tokens=64,
        eval_context=32, calib_tokens=64, report_plot=folder / "curve.svg",
    )  # fmt: skip
    return compile_model(options), folder / "out", folder / "curve.svg"


def test_a_target_in_bits_is_met_and_the_report_tells_how(at_four_bits):
    result, out, plot = at_four_bits
    allocation = json.loads((out / "report.json").read_text())["allocation"]
    assert allocation == result.to_json()["allocation"]
    assert 3.5 < result.bits_per_weight_linears <= 4
    assert allocation["bits_per_weight"] == pytest.approx(result.bits_per_weight_linears)
    assert len(allocation["choices"]) == 8
    costs = [point["predicted"] for point in allocation["curve"] if point["label"] == "auto"]
    assert costs == sorted(costs, reverse=True)
    uniform = [
        point["predicted"]
        for point in allocation["curve"]
        if point["label"] != "auto" and point["bits_per_weight"] <= allocation["bits_per_weight"]
    ]
    assert allocation["predicted"] < min(uniform)
    assert "</svg>" in plot.read_text()
    assert not out.with_name("out.resume").exists()
    assert load(out, device="cpu").generate("Once", max_tokens=2)


def test_a_killed_run_resumes_to_the_same_bytes(random_llama, at_four_bits, tmp_path, capsys, monkeypatch):
    arguments = ("--target-bpw", "4", "--method", "gptq")
    stored = Workspace.store

    def until(count):
        done = []

        def store(self, layer, tensors, info):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(layer)
            stored(self, layer, tensors, info)

        monkeypatch.setattr(Workspace, "store", store)

    again = tmp_path / "out"
    for count in (1, 2):  # in the sensitivities, then between allocation and layers
        until(count)
        assert run(qcompile, [str(random_llama), "-o", str(again), *FAST, *arguments, "--resume"]) == 130
        capsys.readouterr()
    monkeypatch.setattr(Workspace, "store", stored)
    monkeypatch.setattr(sensitivity, "restored", lambda *_: pytest.fail("measured twice"))
    assert compiled(capsys, random_llama, again, *arguments, "--resume")[0] == 0
    assert tree(again) == tree(at_four_bits[1])


def test_a_target_in_bytes_bounds_the_whole_artifact(random_llama, tmp_path, capsys):
    data_free = ("--sensitivity", "weights", "--target-size")
    code, told = compiled(capsys, random_llama, tmp_path / "x", *data_free, "100kB")
    assert code == 2
    smallest = int(re.search(r"the smallest choices take (\d+) bytes", told)[1])
    size = smallest + 20_000
    code, result = compiled(capsys, random_llama, tmp_path / "out", *data_free, str(size))
    assert code == 0
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert size - 60_000 < total == result["bytes"] <= size


def test_a_target_in_kl_is_met_by_measurement(random_llama, tmp_path, capsys):
    data_free = ("--method", "rtn", "--sensitivity", "weights")
    _, result = compiled(capsys, random_llama, tmp_path / "four", *data_free, "--target-bpw", "4")
    target = 2 * result["quality"]["kl_mean"]
    code, result = compiled(capsys, random_llama, tmp_path / "out", *data_free, "--target-kl", str(target))
    assert code == 0
    assert result["quality"]["kl_mean"] <= target
    assert result["bits_per_weight_linears"] < 4
    trials = result["allocation"]["trials"]
    assert min(t["bits_per_weight"] for t in trials if t["kl"] <= target) == pytest.approx(
        result["bits_per_weight_linears"]
    )
    failed = [t["bits_per_weight"] for t in trials if t["kl"] > target]
    assert max(failed) > 0.9 * result["bits_per_weight_linears"]
    impossible = ("--target-kl", "1e-12", "--group-size", "128")
    code, told = compiled(capsys, random_llama, tmp_path / "no", *data_free, *impossible)
    assert code == 3
    assert "no allocation was found" in told
    assert not list(tmp_path.glob("no*"))


def test_dry_run_tells_the_range_and_reads_no_weights(random_llama, tmp_path, capsys, monkeypatch):
    from qcompiler.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
    code, result = compiled(capsys, random_llama, tmp_path / "out", "--target-bpw", "3.5", "--dry-run")
    assert code == 0
    told = result["allocation"]
    assert told["groups"] == 8
    assert "gptq 3 g128" in told["candidates"]
    assert told["smallest_bits_per_weight"] < result["bits_per_weight_linears"] <= 3.5
    assert told["largest_bits_per_weight"] > 8
    code, told = compiled(capsys, random_llama, tmp_path / "out", "--target-bpw", "1.5", "--dry-run")
    assert code == 2
    assert "cannot be met" in told


def test_contradictions_are_refused_before_any_work(random_llama, tmp_path, capsys):
    for arguments, told in [
        (["--target-bpw", "3", "--bits", "4"], "contradict"),
        (["--target-bpw", "3", "--target-kl", "0.1"], "two targets"),
        (["--method", "auto"], "needs a target"),
        (["--target-bpw", "0"], "cannot be met"),
        (["--target-bpw", "nan"], "cannot be met"),
        (["--target-size", "5 bananas"], "is not a size"),
        (["--report-plot", "x.png"], "no target to plot"),
        (["--target-bpw", "3", "--report-plot", "x.bmp"], "cannot be written"),
    ]:
        code, message = compiled(capsys, random_llama, tmp_path / "out", *arguments)
        assert (code, told in message) == (2, True), (arguments, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("4.5 GiB", 4831838208), ("800 mb", 8 * 10**8), ("123", 123)]
)
def test_sizes_are_read_as_written(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("kind", ["mixtral", "gemma2"])
def test_sensitivities_of_other_architectures(kind, tmp_path):
    """Experts beside measured linears; soft-capped attention: gradients go through every op's reference."""
    from qcompiler.calibration.runner import MemoryStore
    from qcompiler.capture import ModelSource
    from qcompiler.capture.matrix import SUPPORTED, eager_model

    config = next(row for row in SUPPORTED if row.name == kind).config()
    config.vocab_size = 256
    eager_model(ModelSource.from_config(config)).float().save_pretrained(tmp_path / "model")
    plan = make_plan(CompileOptions(str(tmp_path / "model"), method="rtn", target_bpw=5.0, device="cpu"))
    candidates, groups = pool(plan.options, calibrated=True), groups_of(plan)
    tokens = torch.arange(2048) % 251
    costs = measure(plan, groups, candidates, tokens, MemoryStore(), Progress())
    assert any(layer.kind == "experts" for group in groups for layer in group.layers) == (kind == "mixtral")
    assert [group.name for group in groups] == list(costs)
    for by_label in costs.values():
        assert by_label["rtn 2 g64"] > by_label["rtn 4 g64"] > by_label["rtn 8 g128"] > 0
