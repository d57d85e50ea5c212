"""Mixture-of-experts checkpoints through the whole road: experts quantized, streamed, stored, run."""

from __future__ import annotations

import json
import math

import pytest
import torch

import qcompiler
from qcompiler.capture import ModelSource
from qcompiler.capture.matrix import SUPPORTED, eager_model, relative_difference
from qcompiler.cli.main import qcompile, run
from qcompiler.kernels.errors import ArtifactError
from qcompiler.kernels.formats import get_format
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.manifest import checksum

# fp32 on both sides; what differs is the order of additions.
TIE = 1e-4
NF4 = ("--method", "bnb", "--bits", "4", "--group-size", "64")
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(20, 43))]


def save(name, folder):
    """A tiny random model of a family, as transformers saves it."""
    family = next(row for row in SUPPORTED if row.name == name)
    model = eager_model(ModelSource.from_config(family.config())).float()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(family, *flags)` → (checkpoint, artifact, what --json printed)."""
    made = {}

    def call(name, capsys, *flags):
        if (name, flags) not in made:
            root = tmp_path_factory.mktemp(name)
            arguments = ["--dtype", "float32", "--eval-tokens", "0", "--json", "--group-size", "16", *flags]
            folder = save(name, root / "model")
            assert run(qcompile, [str(folder), "-o", str(root / "artifact"), *arguments]) == 0
            made[name, flags] = folder, root / "artifact", json.loads(capsys.readouterr().out)
        return made[name, flags]

    return call


def dequantized(folder, artifact):
    """The transformers model with every quantized weight replaced by what the stored tensors stand for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    opened = open_artifact(artifact)
    replaced = 0
    for entry in opened.manifest.layers:
        format_ = get_format(entry.format)
        tensors = {part: opened.read(name) for part, name in entry.tensors.items()}
        weight = format_.dequantize(
            format_.spec_from_json(entry.spec), tensors, entry.in_features, torch.float32
        )
        if entry.experts > 1:
            held = model.get_parameter(entry.name)
            weight = weight.view(entry.experts, -1, entry.in_features)
            held.data = weight.transpose(1, 2) if held.shape != weight.shape else weight
            replaced += 1
            continue
        parent, _, leaf = entry.name.rpartition(".")
        row = 0
        for part in leaf.split("_and_"):
            linear = model.get_submodule(f"{parent}.{part}")
            linear.weight.data = weight[row : row + linear.out_features].clone()
            row += linear.out_features
    assert replaced == 2 * model.config.num_hidden_layers
    return model.eval()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mixtral", ("--method", "rtn", "--bits", "4")),
        ("mixtral", ("--method", "hqq", "--bits", "3")),
        ("mixtral", NF4),
        ("mixtral", ("--method", "eetq", "--bits", "8", "--group-size", "0")),
        ("qwen3_moe", ("--method", "rtn", "--bits", "8")),
        ("qwen3_moe", ("--method", "hqq", "--bits", "4")),
        (
            "qwen3_moe",
            (
                "--method",
                "bnb",
                "--bits",
                "4",
                "--quant-type",
                "fp4",
                "--no-double-quant",
                "--group-size",
                "32",
            ),
        ),
        ("qwen3_moe", ("--method", "eetq", "--bits", "8", "--group-size", "0")),
        ("gpt_oss", ("--method", "bnb", "--bits", "4", "--group-size", "64", "--skip", "self_attn.*")),
        (
            "gpt_oss",
            ("--method", "rtn", "--bits", "6", "--skip", "self_attn.*"),
        ),  # experts [E, in, out], biases
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_the_dequantized_experts(name, flags, compiled, capsys):
    folder, artifact, _ = compiled(name, capsys, *flags)
    oracle = dequantized(folder, artifact)
    for lean in (False, True):
        model = qcompiler.load(artifact, device="cpu", lean=lean)
        for prompt in PROMPTS:
            wanted = oracle(torch.tensor([prompt])).logits[0]
            assert relative_difference(model.logits(prompt), wanted) < 1e-5
    compared = 0
    answers = model.generate_tokens(PROMPTS, max_tokens=12, temperature=0, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        for token in answer.token_ids:
            first, second = oracle(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
            if first - second > TIE:
                assert int(oracle(torch.tensor([ids])).logits[0, -1].argmax()) == token
                compared += 1
            ids.append(token)
    assert compared > 20


def test_experts_stand_in_manifest_and_report(compiled, capsys):
    _, artifact, report = compiled("mixtral", capsys, "--method", "rtn", "--bits", "4")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    entry = next(e for e in open_artifact(artifact).manifest.layers if e.name == name)
    config = json.loads((artifact / "config.json").read_text())
    assert entry.experts == config["num_local_experts"] == 4
    assert entry.out_features == 4 * 2 * config["intermediate_size"]
    layer = next(item for item in report["layers"] if item["name"] == name)
    assert layer["bits"] == 4
    assert 0 < layer["relative_error"] < 0.02
    assert not any("experts" in skipped["name"] for skipped in report["linears_skipped"])
    held = open_artifact(artifact).tensors.entries.values()
    stored = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in held)
    flags = ["--json", "--method", "rtn", "--bits", "4", "--group-size", "16", "--dtype", "float32"]
    model, never = artifact.parent / "model", artifact.parent / "never"
    assert run(qcompile, [str(model), "-o", str(never), "--dry-run", *flags]) == 0
    # rotary frequencies are the only tensors that are no weights
    assert 0 <= stored - json.loads(capsys.readouterr().out)["bytes"] < 1000


def test_patterns_reach_experts(compiled, capsys):
    flags = (
        "--method",
        "rtn",
        "--bits",
        "4",
        "--bits",
        "experts.down_proj=8",
        "--skip",
        "*.0.mlp.experts.gate_up_proj",
    )
    _, artifact, report = compiled("mixtral", capsys, *flags)
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert bits["model.layers.0.mlp.experts.down_proj"] == bits["model.layers.1.mlp.experts.down_proj"] == 8
    assert bits["model.layers.1.mlp.experts.gate_up_proj"] == 4
    skipped = {item["name"]: item["reason"] for item in report["linears_skipped"]}
    assert skipped["model.layers.0.mlp.experts.gate_up_proj"].startswith("--skip")
    weights = open_artifact(artifact).tensors.entries
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    assert "model.layers.0.mlp.experts.gate_up_proj.low" not in weights


def test_experts_are_quantized_one_at_a_time(tmp_path, monkeypatch):
    from qcompiler.methods.rtn import RoundToNearest

    shapes = []
    quantize = RoundToNearest.quantize

    def watched(self, weight, spec, options=None, *, name="weight"):
        shapes.append((name, tuple(weight.shape)))
        return quantize(self, weight, spec, options, name=name)

    monkeypatch.setattr(RoundToNearest, "quantize", watched)
    folder = save("qwen3_moe", tmp_path / "model")
    flags = ["--method", "rtn", "--dtype", "float32", "--eval-tokens", "0", "-q"]
    assert run(qcompile, [str(folder), "-o", str(tmp_path / "out"), *flags]) == 0
    experts = [(name, shape) for name, shape in shapes if "experts" in name]
    assert "model.layers.0.mlp.experts.down_proj[3]" in dict(experts)
    assert len(experts) == 2 * 2 * 4
    assert all(len(shape) == 2 and max(shape) <= 128 for _, shape in experts)


def test_a_method_without_a_grouped_op_leaves_experts_and_says_so(compiled, capsys):
    _, artifact, report = compiled("mixtral", capsys, "--method", "bnb", "--bits", "8", "--group-size", "0")
    reasons = {item["name"]: item["reason"] for item in report["linears_skipped"]}
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "LLM.int8() has no op for expert weights."
    assert qcompiler.load(artifact, device="cpu").logits([1, 2, 3]).isfinite().all()


def reseal(artifact, change, copy):
    """A copy of an artifact with its manifest's layers changed as an attacker would, checksum and all."""
    import shutil

    shutil.copytree(artifact, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest["layers"])
    manifest["checksum"] = checksum(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("experts", [0, 7, 1 << 40, "4"])
def test_a_senseless_number_of_experts_is_refused(experts, compiled, capsys, tmp_path):
    _, artifact, _ = compiled("mixtral", capsys, "--method", "rtn", "--bits", "4")

    def change(layers):
        next(layer for layer in layers if "experts" in layer)["experts"] = experts

    with pytest.raises(ArtifactError, match="experts"):
        open_artifact(reseal(artifact, change, tmp_path / "copy"))


@pytest.mark.parametrize("experts", [2, 8])
def test_lut4_experts_of_another_number_than_stored_are_refused(experts, compiled, capsys, tmp_path):
    _, artifact, _ = compiled("mixtral", capsys, *NF4)

    def change(layers):
        next(layer for layer in layers if "experts" in layer)["experts"] = experts

    with pytest.raises(ArtifactError, match="nested_"):
        open_artifact(reseal(artifact, change, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("method", "argument", "value"),
    [("affine", 7, 8), ("affine", 8, 64), ("affine", 9, 128), ("lut4", 9, 128), ("lut4", 10, 128)],
)
def test_a_grouped_node_whose_settings_do_not_fit_its_tensors_is_refused(
    method, argument, value, compiled, capsys, tmp_path
):
    import hashlib

    flags = {"affine": ("--method", "rtn", "--bits", "4"), "lut4": NF4}[method]
    _, artifact, _ = compiled("mixtral", capsys, *flags)
    copy = reseal(artifact, lambda layers: None, tmp_path / "copy")
    graph = json.loads((copy / "graph.json").read_text())
    node = next(n for n in graph["nodes"] if n["op"] == f"qcompiler.grouped_linear_{method}.default")
    node["args"][argument] = value
    data = json.dumps(graph).encode()
    (copy / "graph.json").write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["graph.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["checksum"] = checksum(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"grouped_linear_{method}"):
        open_artifact(copy)
