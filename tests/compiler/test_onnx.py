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
# fp32 on both sides, sums in another order; logits reach 20, measured below 3e-5.
LOGITS_TOLERANCE = 2e-4
ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("QCOMPILER_MODELS", ROOT.parent / "shared" / "models"))

VARIANTS = {
    "hqq 4 bits": ("--method", "hqq", "--bits", "4"),
    "rtn 8 bits": ("--method", "rtn", "--bits", "8"),
    "nf4": ("--method", "bnb", "--bits", "4"),
}
OPERATOR = {"hqq 4 bits": "MatMulNBits", "rtn 8 bits": "MatMulNBits", "nf4": "MatMulBnb4"}


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(model, variant)`: an artifact and its emission, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, variant: str) -> tuple[Path, Path]:
        if (name, variant) not in made:
            out = tmp_path_factory.mktemp("onnx") / "model"
            assert qcompile(
                checkpoint(name), *VARIANTS[variant], "--dtype", "float32", "--eval-tokens", 0, "-q",
                "--emit", "artifact,onnx", "-o", out,
            ) == 0  # fmt: skip
            made[name, variant] = out
        return made[name, variant], made[name, variant].with_name("model-onnx")

    return make


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tiny-llama", pytest.param("small-llama", marks=pytest.mark.slow)])
def test_onnxruntime_says_what_the_engine_says(name, variant, compiled):
    artifact, folder = compiled(name, variant)
    engine, emitted = load(artifact, device="cpu"), OnnxModel(folder, threads=1)
    report = json.loads((folder / "report.json").read_text())
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


def test_an_encoder_gives_the_same_features(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    assert qcompile(
        tmp_path / "bert", "--bits", 8, "--group-size", 32, "-q", "--emit", "artifact,onnx", "-o", out
    ) == 0  # fmt: skip
    engine, emitted = load(out, device="cpu"), OnnxModel(tmp_path / "out-onnx", threads=1)
    tokens = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    got = torch.from_numpy(emitted.encode(tokens.numpy(), mask.numpy()))
    wanted = engine._encode([tokens[0].tolist(), tokens[1, :6].tolist()])
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1, :6], wanted[1], atol=1e-4, rtol=0)


def test_onnx_alone_leaves_no_artifact_and_shares_a_tied_table(random_tied, tmp_path):
    out = tmp_path / "out"
    assert qcompile(
        random_tied, "--method", "rtn", "--bits", 4, "--group-size", 32, "--embedding-bits", 8, "-q",
        "--eval-tokens", 0, "--dtype", "float32", "--emit", "onnx", "-o", out,
    ) == 0  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    places = {
        i.name: {e.key: e.value for e in i.external_data}["offset"]
        for i in model.graph.initializer
        if i.external_data
    }
    (table,) = [name for name in places if name.endswith(".table")]
    assert places[table] == places[table.replace(".table", ".codes")]
    logits, _ = OnnxModel(out, threads=1).step(np.array([[5, 9]]), OnnxModel(out).empty_cache())
    assert np.isfinite(logits).all()


@pytest.fixture
def random_tied(make_checkpoint, tmp_path_factory):
    """A random llama whose head is its embedding."""
    return make_checkpoint(tmp_path_factory.mktemp("tied") / "llama", tie_word_embeddings=True)


def test_an_artifact_with_float_zero_points_is_solved_again_and_measured(random_llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert qcompile(
        random_llama, "--bits", 4, "--group-size", 32, "-q", "--eval-tokens", 0, "--dtype", "float32",
        "-o", out,
    ) == 0  # fmt: skip
    assert qcompile("emit", out, "--to", "onnx", "--eval-tokens", 256, "--json", "-q") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["solved_again"] == len(load(out, device="cpu").artifact.manifest.layers)
    assert 0 < report["against_artifact"]["kl_mean"] < 0.1
    assert report["output"] == str(tmp_path / "out-onnx")

    # With its own zero points the artifact is emitted as it is.
    assert qcompile("emit", out, "--to", "onnx", "--zeros", "float", "-o", tmp_path / "exact", "-q") == 0
    prompt = [5, 9, 77, 1200, 3]
    emitted = OnnxModel(tmp_path / "exact", threads=1)
    logits, _ = emitted.step(np.array([prompt]), emitted.empty_cache())
    wanted = load(out, device="cpu").logits(prompt).float()
    torch.testing.assert_close(torch.from_numpy(logits[0]), wanted, atol=1e-4, rtol=0)


def test_onnxruntime_genai_reads_the_folder(compiled):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    _, out = compiled("tiny-llama", "hqq 4 bits")
    model = genai.Model(str(out))
    prompt = [int(token) for token in genai.Tokenizer(model).encode("It was a dark and stormy night")]
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 16, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    assert found == OnnxModel(out, threads=1).generate(prompt, 16)[: len(found)]


def test_weights_of_16_bits_stay_so_in_the_file(random_tied, tmp_path):
    out = tmp_path / "out"
    assert qcompile(
        random_tied, "--method", "rtn", "--bits", 8, "--group-size", 32, "--option", "zeros=integer", "-q",
        "--eval-tokens", 0, "--dtype", "bfloat16", "-o", out,
    ) == 0  # fmt: skip
    engine, prompt = load(out, device="cpu"), [5, 9, 77, 1200, 3]
    wanted = engine.logits(prompt).float()
    table = 2048 * 64 * 2
    weights = [2 * layer.out_features * layer.in_features for layer in engine.artifact.manifest.layers]
    for activations in ("float32", "float16"):
        folder = tmp_path / activations
        assert qcompile("emit", out, "--to", "onnx", "--dtype", activations, "-o", folder, "-q") == 0
        assert (folder / "model.onnx.data").stat().st_size < table + sum(weights)
        model = OnnxModel(folder, threads=1)
        logits, cache = model.step(np.array([prompt]), model.empty_cache())
        assert {str(array.dtype) for array in (logits, *cache.values())} == {activations}
        # The engine computes in bfloat16: 8 bits of each number, through two layers.
        difference = torch.from_numpy(logits[0]).float() - wanted
        assert difference.norm() < 0.03 * wanted.norm()
