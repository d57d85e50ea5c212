"""Emission for onnxruntime: what it computes is what the runtime's engine computes on the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler.cli.main import main
from qcompiler.data import default_text
from qcompiler.runtime.model import load

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from qcompiler.emit.onnx.run import OnnxModel  # noqa: E402

PROMPTS, NEW_TOKENS = 10, 32
# fp32 on both sides, sums in another order: 16-bit scales times codes up to 255, over 4 to 30 layers.
LOGITS_TOLERANCE = 2e-3
ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("QCOMPILER_MODELS", ROOT.parent / "shared" / "models"))

VARIANTS = {
    "hqq 4 bits": ("--method", "hqq", "--bits", "4"),
    "hqq 8 bits": ("--method", "hqq", "--bits", "8"),
    "nf4": ("--method", "bnb", "--bits", "4"),
}
OPERATOR = {"hqq 4 bits": "MatMulNBits", "hqq 8 bits": "MatMulNBits", "nf4": "MatMulBnb4"}


def checkpoint(name: str) -> Path:
    if name == "tiny-llama":
        return ROOT / "examples" / "models" / name
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not on this machine (set QCOMPILER_MODELS to the folder that holds it)")
    return folder


def qcompile(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tiny-llama", "small-llama"])
def test_onnxruntime_says_what_the_engine_says(name, variant, tmp_path):
    out = tmp_path / "model"
    assert qcompile(
        checkpoint(name), *VARIANTS[variant], "--dtype", "float32", "--eval-tokens", 0, "-q",
        "--emit", "artifact,onnx", "-o", out,
    ) == 0  # fmt: skip
    engine, emitted = load(out, device="cpu"), OnnxModel(tmp_path / "model-onnx", threads=1)
    report = json.loads((tmp_path / "model-onnx" / "report.json").read_text())
    assert report["operators"][OPERATOR[variant]] == len(engine.artifact.manifest.layers)
    depth = engine.artifact.json("config.json")["num_hidden_layers"]
    assert report["operators"]["GroupQueryAttention"] == depth
    text = engine.tokenizer.encode(default_text("eval")[:20000], add_special_tokens=False)
    prompts = [text[i * 97 : i * 97 + 4 + 2 * i] for i in range(PROMPTS)]
    wanted = [g.token_ids for g in engine.generate_tokens(prompts, temperature=0.0, max_tokens=NEW_TOKENS)]
    for prompt, tokens in zip(prompts, wanted, strict=True):
        assert emitted.generate(prompt, NEW_TOKENS)[: len(tokens)] == tokens
    logits, _ = emitted.step(np.array([prompts[-1]]), emitted.empty_cache())
    torch.testing.assert_close(
        torch.from_numpy(logits[0]), engine.logits(prompts[-1]).float(), atol=LOGITS_TOLERANCE, rtol=0
    )
