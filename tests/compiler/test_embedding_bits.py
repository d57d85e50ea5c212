"""`--embedding-bits` on tiny-llama, whose head is tied: one table, as large as accounted, little lost."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import qcompiler
from qcompiler.cli.main import qcompile, run
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.options import CompileOptions
from qcompiler.runtime.artifact import open_artifact

FAST = ["--method", "rtn", "--bits", "8", "--dtype", "float32", "--eval-tokens", "512", "--json"]
TABLE = "model.embed_tokens"


@pytest.fixture(scope="module")
def compiled(tiny_llama, tmp_path_factory):
    """`compiled(capsys, *flags)` → (artifact, what --json printed)."""
    made = {}

    def call(capsys, *flags, model=tiny_llama):
        if (model, flags) not in made:
            out = tmp_path_factory.mktemp("embedding") / "artifact"
            assert run(qcompile, [str(model), "-o", str(out), *FAST, *flags]) == 0
            made[model, flags] = out, json.loads(capsys.readouterr().out)
        return made[model, flags]

    return call


def weight_bytes(artifact):
    tensors = open_artifact(artifact).tensors.entries
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_artifact_shrinks_by_what_is_accounted(bits, compiled, capsys, tiny_llama):
    plain, plain_report = compiled(capsys)
    small, report = compiled(capsys, "--embedding-bits", str(bits))
    config = json.loads((tiny_llama / "config.json").read_text())
    rows, columns = config["vocab_size"], config["hidden_size"]
    stored = AFFINE.nbytes(AffineSpec(bits, 64), rows, columns)
    assert weight_bytes(plain) - weight_bytes(small) == 4 * rows * columns - stored
    weights = 8 * weight_bytes(plain) / plain_report["bits_per_weight"]
    saved = 8 * (4 * rows * columns - stored) / weights
    assert plain_report["bits_per_weight"] - report["bits_per_weight"] == pytest.approx(saved, rel=1e-3)
    assert report["bits_per_weight_linears"] == plain_report["bits_per_weight_linears"]
    assert report["embeddings"] == [
        {"name": TABLE, "bits_per_weight": 8 * stored / (rows * columns), "shared_with": ["lm_head"]}
    ]
    assert report["linears_quantized"] == plain_report["linears_quantized"] + 1
    assert report["linears_skipped"] == []


def test_eight_bits_cost_little_and_four_more(compiled, capsys):
    eight = compiled(capsys, "--embedding-bits", "8")[1]["quality"]
    four = compiled(capsys, "--embedding-bits", "4")[1]["quality"]
    assert eight["kl_mean"] < 1e-3
    assert eight["kl_mean"] < four["kl_mean"] < 0.1


def test_no_second_copy_is_stored(compiled, capsys):
    artifact, _ = compiled(capsys, "--embedding-bits", "4")
    opened = open_artifact(artifact)
    names = set(opened.tensors.entries)
    assert {f"{TABLE}.low", f"{TABLE}.scales", f"{TABLE}.zeros"} <= names
    assert not {n for n in names if "lm_head" in n or n == f"{TABLE}.weight"}
    readers = [n["op"] for n in json.loads((artifact / "graph.json").read_text())["nodes"]
               if f'"{TABLE}.low"' in json.dumps(n)]  # fmt: skip
    assert sorted(readers) == ["qcompiler.embedding_affine.default", "qcompiler.linear_affine.default"]
    assert [layer.name for layer in opened.manifest.layers].count(TABLE) == 1


@torch.inference_mode()
def test_logits_are_those_of_transformers_with_the_dequantized_table(compiled, capsys, tiny_llama):
    from transformers import AutoModelForCausalLM

    artifact, _ = compiled(capsys, "--embedding-bits", "4", "--skip", "model.layers.*")
    opened = open_artifact(artifact)
    (entry,) = opened.manifest.layers
    tensors = {part: opened.read(name) for part, name in entry.tensors.items()}
    oracle = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    oracle.model.embed_tokens.weight.data = AFFINE.dequantize(
        AffineSpec.from_json(entry.spec), tensors, entry.in_features, torch.float32
    )
    oracle.tie_weights()
    ids = [3, 100, 7, 2000, 55]
    wanted = oracle(torch.tensor([ids])).logits[0]
    for lean in (False, True):
        model = qcompiler.load(artifact, device="cpu", lean=lean)
        got = model.logits(ids)
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert len(model.generate("Once upon a time", max_tokens=8, temperature=0)) > 0


def test_a_skipped_head_keeps_the_float_table(compiled, capsys):
    artifact, report = compiled(capsys, "--embedding-bits", "8", "--skip", "lm_head")
    assert report["embeddings"][0]["shared_with"] == []
    assert report["linears_skipped"] == [{"name": "lm_head", "reason": "--skip lm_head"}]
    assert f"{TABLE}.low" in open_artifact(artifact).tensors.entries
    assert any(name.endswith(".weight") and tensor.shape[0] == 2048
               for name, tensor in open_artifact(artifact).tensors.entries.items()
               if len(tensor.shape) == 2)  # fmt: skip


def test_an_untied_head_stays_on_its_own(compiled, capsys, random_llama):
    artifact, report = compiled(capsys, "--embedding-bits", "8", "--lm-head-bits", "6", model=random_llama)
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    assert (bits[TABLE], bits["lm_head"]) == (8, 6)
    assert report["embeddings"][0]["shared_with"] == []
    assert {f"{TABLE}.low", "lm_head.low"} <= set(open_artifact(artifact).tensors.entries)


def test_other_bits_for_a_tied_head_are_refused(tiny_llama, tmp_path, capsys):
    flags = ["--embedding-bits", "4", "--lm-head-bits", "8"]
    assert run(qcompile, [str(tiny_llama), "-o", str(tmp_path / "out"), *FAST, *flags]) == 2
    assert "lm_head is tied to the embedding" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [0, 2, 5, 16])
def test_widths_on_offer(bits):
    with pytest.raises(InvalidInputError, match="embeddings cannot have"):
        CompileOptions("model", embedding_bits=bits)


def test_a_method_whose_format_cannot_be_gathered_rounds_the_table(compiled, capsys, tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    flags = ["--embedding-bits", "8", "--method", "eetq"]
    assert run(qcompile, [str(folder), "-o", str(tmp_path / "out"), *FAST, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["embeddings"][0]["bits_per_weight"] == 8.5
    assert report["quality"]["kl_mean"] < 1e-3


def test_dry_run_tells_the_same_size(compiled, capsys, tiny_llama, tmp_path):
    artifact, _ = compiled(capsys, "--embedding-bits", "8")
    assert run(qcompile, [str(tiny_llama), "-o", str(tmp_path / "out"), *FAST, "--embedding-bits", "8",
                          "--dry-run"]) == 0  # fmt: skip
    estimate = json.loads(capsys.readouterr().out)
    assert [table["name"] for table in estimate["embeddings"]] == [TABLE]
    # rotary frequencies are the only tensors that are no weights
    assert 0 <= weight_bytes(artifact) - estimate["bytes"] < 1000
