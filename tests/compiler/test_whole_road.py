"""Checkpoint to text: the engine on a compiled artifact says what transformers says with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
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
    return model.eval(), opened


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
    oracle, _ = dequantized_transformers(folder, artifact)
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


# method, its arguments, formats in the artifact, and how far the engine may be from dequantized weights:
# fp32 sums in another order, except where activations are quantized too.
METHODS = [
    ("bnb", ["--bits", "4"], "lut4", 1e-4),
    ("bnb", ["--bits", "4", "--quant-type", "fp4", "--no-double-quant"], "lut4", 1e-4),
    ("bnb", ["--bits", "8"], "int8_channel", 5e-2),
    ("eetq", [], "int8_channel", 1e-4),
    ("hqq", ["--bits", "3"], "affine", 1e-4),
    ("hqq", ["--bits", "3", "--tail-fraction", "0.01"], "body_tail", 1e-4),
    ("gptq", ["--bits", "4", "--calib-tokens", "512"], "affine", 1e-4),
    (
        "aqlm",
        ["--bits", "2", "--calib-tokens", "512", "--option", "epochs=1", "--beam", "2"],
        "additive",
        1e-4,
    ),
]


@pytest.mark.parametrize(("method", "arguments", "format_name", "tolerance"), METHODS)
def test_every_method_goes_the_whole_road(random_llama, tmp_path, method, arguments, format_name, tolerance):
    artifact = tmp_path / "artifact"
    common = ["--method", method, "--dtype", "float32", "--eval-tokens", "64", "--eval-context", "32", "-q"]
    assert run(qcompile, [str(random_llama), "-o", str(artifact), *common, *arguments]) == 0
    oracle, opened = dequantized_transformers(random_llama, artifact)
    assert {entry.format for entry in opened.manifest.layers} == {format_name}
    # One launch for Q, K and V, and one for gate and up, where the format can stand side by side.
    fused = 7 if format_name in ("lut4", "additive") else 4
    assert len(opened.manifest.layers) == fused * oracle.config.num_hidden_layers
    ids = list(range(3, 40))
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0]
    actual = qcompiler.load(artifact, device="cpu").logits(ids)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def run_patched(model: Path, out: Path, patch: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Run qcompile with gptq in a process of its own, after replacing `GPTQ.quantize_block` by `patch`."""
    arguments = [str(model), "-o", str(out), *GPTQ, *extra]
    lines = [
        "import os, signal",
        "from qcompiler.methods.gptq import GPTQ",
        "original = GPTQ.quantize_block",
        patch,
        "GPTQ.quantize_block = quantize_block",
        "from qcompiler.cli.main import main",
        f"main({arguments!r})",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


GPTQ = ["--method", "gptq", "--bits", "3", "--calib-tokens", "512", "--eval-tokens", "0", "-q"]
KILL = """
def quantize_block(self, task):
    if task.name.endswith(".1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, task)
"""
ONLY_THE_SECOND = """
def quantize_block(self, task):
    if not task.name.endswith(".1"):
        raise SystemExit(f"{task.name} was done again")
    return original(self, task)
"""


def test_a_killed_calibration_resumes_at_the_block_it_was_in(random_llama, tmp_path):
    unbroken, killed = tmp_path / "a" / "same", tmp_path / "b" / "same"
    assert run(qcompile, [str(random_llama), "-o", str(unbroken), *GPTQ]) == 0
    assert run_patched(random_llama, killed, KILL).returncode == -9
    resumed = run_patched(random_llama, killed, ONLY_THE_SECOND, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    first, second = ({p.name: p.read_bytes() for p in out.iterdir()} for out in (unbroken, killed))
    assert first == second
