"""Families of the support matrix in onnxruntime: a prompt, then token by token, against eager logits."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_families import compile_family

from qcompiler.capture.matrix import SUPPORTED, eager_logits, relative_difference
from qcompiler.runtime.artifact import open_artifact

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from qcompiler.emit.onnx.emit import OnnxOptions, emit_onnx  # noqa: E402
from qcompiler.emit.onnx.run import OnnxModel  # noqa: E402

# fp32 on both sides, two layers; measured below 4e-6 on every family that can be emitted.
TOLERANCE = 1e-5
BY_NAME = {family.name: family for family in SUPPORTED}
TOKENS, PROMPT, SHORT = 23, 17, 9

# Windows and soft caps; positions as embeddings; partial, interleaved rotation.
CASES = [("gemma2", "auto"), ("gemma2", "plain"), ("gpt2", "auto"), ("glm", "auto")]
# QCOMPILER_ALL_FAMILIES=1 runs every decoder without experts that an artifact can hold, both ways.
NOT_THESE = {
    *("mixtral", "deepseek_v2", "deepseek_v3", "dots1", "gpt_oss", "llama4_text", "granitemoe", "phimoe"),
    *("apertus", "electra", "esm"),
}
if os.environ.get("QCOMPILER_ALL_FAMILIES"):
    others = [name for name in BY_NAME if not ("moe" in name or "bert" in name or name in NOT_THESE)]
    CASES += [(name, way) for name in others for way in ("auto", "plain") if (name, way) not in CASES]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(family)`: the eager model and the artifact, made once."""
    made = {}

    def make(family):
        if family.name not in made:
            folder = tmp_path_factory.mktemp("family") / "a"
            made[family.name] = (compile_family(family, folder), folder)
        return made[family.name]

    return make


def tokens() -> torch.Tensor:
    return torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_decoder_gives_its_eager_logits(name, attention, compiled, tmp_path):
    eager, artifact = compiled(BY_NAME[name])
    report = emit_onnx(open_artifact(artifact), tmp_path / "o", OnnxOptions(attention=attention))
    assert ("GroupQueryAttention" in report.operators) == (attention == "auto")
    model, ids = OnnxModel(tmp_path / "o", threads=1), tokens()
    logits, cache = model.step(ids[:, :PROMPT].numpy(), model.empty_cache(2))
    parts = [logits]
    for i in range(PROMPT, TOKENS):
        logits, cache = model.step(ids[:, i : i + 1].numpy(), cache)
        parts.append(logits)
    for got, row in zip(torch.from_numpy(np.concatenate(parts, 1)), ids, strict=True):
        assert relative_difference(got, eager_logits(eager, row[None])[0]) < TOLERANCE


@pytest.mark.parametrize(("attention", "side"), [("auto", "right"), ("plain", "right"), ("plain", "left")])
def test_rows_of_unequal_length_are_padded(attention, side, compiled, tmp_path):
    eager, artifact = compiled(BY_NAME["gemma2"])
    emit_onnx(open_artifact(artifact), tmp_path / "o", OnnxOptions(attention=attention))
    model, ids = OnnxModel(tmp_path / "o", threads=1), tokens()
    padded, mask = ids[:, :PROMPT].clone().numpy(), np.ones((2, PROMPT), np.int64)
    rows = slice(0, SHORT) if side == "right" else slice(PROMPT - SHORT, PROMPT)
    mask[1] = 0
    mask[1, rows] = 1
    padded[1, rows] = ids[1, :SHORT].numpy()
    logits, cache = model.step(padded, model.empty_cache(2), mask)
    wanted = eager_logits(eager, ids[1:, : SHORT + 1])[0]
    assert relative_difference(torch.from_numpy(logits[1, rows]), wanted[:SHORT]) < TOLERANCE
    # The next token of the short row, after its padding.
    following = np.array([[int(ids[0, PROMPT])], [int(ids[1, SHORT])]])
    mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    logits, _ = model.step(following, cache, mask)
    assert relative_difference(torch.from_numpy(logits[1]), wanted[SHORT:]) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_an_encoder_gives_its_eager_logits(name, tmp_path):
    eager = compile_family(BY_NAME[name], tmp_path / "a")
    emit_onnx(open_artifact(tmp_path / "a"), tmp_path / "o")
    model, ids = OnnxModel(tmp_path / "o", threads=1), tokens()
    mask = np.ones((2, TOKENS), np.int64)
    mask[1, SHORT:] = 0
    got = torch.from_numpy(model.encode(ids.numpy(), mask))
    assert relative_difference(got[0], eager_logits(eager, ids[:1])[0]) < TOLERANCE
    assert relative_difference(got[1, :SHORT], eager_logits(eager, ids[1:, :SHORT])[0]) < TOLERANCE


def test_heads_of_a_size_that_grouped_attention_does_not_take_are_said_in_basic_operators(tmp_path):
    family = BY_NAME["llama"]
    family = replace(family, options={**family.options, "head_dim": 12})
    eager = compile_family(family, tmp_path / "a")
    report = emit_onnx(open_artifact(tmp_path / "a"), tmp_path / "o")
    assert "GroupQueryAttention" not in report.operators
    assert any("12" in note for note in report.notes)
    model, ids = OnnxModel(tmp_path / "o", threads=1), tokens()[:1]
    logits, _ = model.step(ids.numpy(), model.empty_cache())
    assert relative_difference(torch.from_numpy(logits[0]), eager_logits(eager, ids)[0]) < TOLERANCE
