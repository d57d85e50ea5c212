"""Checkpoint to text: the engine on a compiled artifact says what transformers says with the same weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.cli.main import qcompile, run
from qcompiler.data import default_text
from qcompiler.kernels.formats import get_format

PROMPTS, NEW_TOKENS = 20, 64
# fp32 on both sides; what differs is the order of additions (about 1e-6 of a logit of size 10).
TIE = 1e-3

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("QCOMPILER_MODELS", ROOT.parent / "shared" / "models"))


def checkpoint(name: str) -> Path:
    if name == "tiny-llama":
        return ROOT / "examples" / "models" / name
    folder = MODELS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not on this machine (set QCOMPILER_MODELS to the folder that holds it)")
    return folder


def dequantized_transformers(folder: Path, artifact: Path):
    """The transformers model with its linears replaced by what the artifact's tensors stand for."""
    from transformers import AutoModelForCausalLM

    from qcompiler.runtime.artifact import open_artifact

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    opened = open_artifact(artifact)
    replaced = 0
    for entry in opened.manifest.layers:
        format_ = get_format(entry.format)
        spec = format_.spec_from_json(entry.spec)
        tensors = {part: opened.read(name) for part, name in entry.tensors.items()}
        weight = format_.dequantize(spec, tensors, entry.in_features, torch.float32)
        replaced += put(model, entry.name, weight)
    assert replaced == 7 * model.config.num_hidden_layers
    return model.eval()


def put(model, name: str, weight: torch.Tensor) -> int:
    """Set the weight of a linear, or of the linears that were fused side by side under this name."""
    parent = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    parts = [leaf] if hasattr(parent, leaf) else fused(parent, weight.shape[0])
    row = 0
    for part in parts:
        linear = getattr(parent, part)
        linear.weight.data = weight[row : row + linear.out_features].clone()
        row += linear.out_features
    assert row == weight.shape[0]
    return len(parts)


def fused(parent, rows: int) -> list[str]:
    for names in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        if (
            all(hasattr(parent, n) for n in names)
            and sum(getattr(parent, n).out_features for n in names) == rows
        ):
            return names
    raise AssertionError(f"no linears of {type(parent).__name__} have {rows} rows together")


def prompts() -> list[str]:
    text = default_text("eval")
    step = len(text) // PROMPTS
    return [text[i * step : i * step + 40 + 7 * i] for i in range(PROMPTS)]


@torch.inference_mode()
def greedy(model, ids: list[int]) -> tuple[list[int], int]:
    """New tokens of transformers' greedy search, and how many of them come before the first tie."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for index, logits in enumerate(out.logits):
        first, second = logits[0].float().topk(2).values.tolist()
        if first - second < TIE:
            return out.sequences[0, len(ids) :].tolist(), index
    return out.sequences[0, len(ids) :].tolist(), NEW_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "small-llama"])
def test_greedy_text_at_8_bits_is_that_of_transformers(name, tmp_path):
    folder = checkpoint(name)
    artifact = tmp_path / "artifact"
    arguments = ["--method", "rtn", "--bits", "8", "--dtype", "float32", "--eval-tokens", "0", "-q"]
    assert run(qcompile, [str(folder), "-o", str(artifact), *arguments]) == 0
    oracle = dequantized_transformers(folder, artifact)
    model = qcompiler.load(artifact, device="cpu")
    texts = prompts()
    encoded = [model.tokenizer.encode(text) for text in texts]
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    batch = model.generate_tokens(encoded, **settings)
    compared = 0
    for ids, answer in zip(encoded, batch, strict=True):
        expected, certain = greedy(oracle, ids)
        assert answer.token_ids[:certain] == expected[:certain]
        compared += certain
    assert compared > 0.9 * PROMPTS * NEW_TOKENS, "too many ties for the comparison to mean anything"

    streamed = ["".join(model.generate(text, stream=True, **settings)) for text in texts[:4]]
    assert streamed == [answer.text for answer in batch[:4]]
