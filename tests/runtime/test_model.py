"""`load` and `generate`: equal to transformers, alone as in a batch as streamed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.model import Generation, load

PROMPTS = [
    "Once upon a time",
    "The compiler reads",
    "It is a truth universally acknowledged",
    "fn main() {",
    "In the year of our Lord",
    "<s>",
]


@pytest.fixture(scope="module")
def oracle(tiny_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def test_logits_equal_those_of_transformers(float_model, oracle):
    ids = float_model.tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    with torch.no_grad():
        wanted = oracle(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(float_model.logits(ids), wanted, rtol=1e-4, atol=1e-4)


def test_greedy_text_equals_that_of_transformers(float_model, oracle):
    for prompt in PROMPTS:
        ids = torch.tensor([float_model.tokenizer.encode(prompt)])
        wanted = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        got = float_model.generate_tokens(ids[0].tolist(), max_tokens=16)
        assert got.token_ids == wanted[0, ids.shape[1] :].tolist()


def test_quantized_logits_equal_those_of_dequantized_weights(q4_model, oracle):
    import copy

    from qcompiler.kernels.formats import get_format

    dequantized = copy.deepcopy(oracle)
    parts = {
        "self_attn.q_proj_and_k_proj_and_v_proj": (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
        ),
        "mlp.gate_proj_and_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    artifact = q4_model.artifact
    format_ = get_format("affine")
    layers = {layer.name: layer for layer in artifact.manifest.layers}
    assert len(layers) == 16
    for index, block in enumerate(dequantized.model.layers):
        for fused, names in parts.items():
            layer = layers[f"model.layers.{index}.{fused}"]
            tensors = {part: artifact.read(name) for part, name in layer.tensors.items()}
            weight = format_.dequantize(
                format_.spec_from_json(layer.spec), tensors, layer.in_features, torch.float32
            )
            modules = [block.get_submodule(name) for name in names]
            for module, piece in zip(
                modules, weight.split([m.weight.shape[0] for m in modules]), strict=True
            ):
                module.weight.data = piece.clone()
    ids = q4_model.tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    with torch.no_grad():
        wanted = dequantized(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(q4_model.logits(ids), wanted, rtol=2e-3, atol=2e-3)


def test_alone_together_and_streamed_are_the_same_text(q4_model):
    alone = [q4_model.generate(p, max_tokens=16) for p in PROMPTS]
    assert q4_model.generate(PROMPTS, max_tokens=16) == alone
    streamed = [""] * len(PROMPTS)
    for index, piece in q4_model.generate(PROMPTS, max_tokens=16, stream=True):
        streamed[index] += piece
    assert streamed == alone
    assert ["".join(q4_model.generate(p, max_tokens=16, stream=True)) for p in PROMPTS] == alone


def test_a_stream_comes_in_pieces_and_may_be_left(q4_model):
    stream = q4_model.generate("Once upon a time", max_tokens=50, stream=True)
    first = next(stream)
    assert first
    assert q4_model.engine.running
    stream.close()
    assert not q4_model.engine.running
    assert q4_model.engine.allocator.available == q4_model.engine.allocator.num_pages


def test_two_streams_side_by_side(q4_model):
    wanted = [q4_model.generate(p, max_tokens=12) for p in PROMPTS[:2]]
    streams = [q4_model.generate(p, max_tokens=12, stream=True) for p in PROMPTS[:2]]
    texts = ["", ""]
    pending = [0, 1]
    while pending:
        for i in list(pending):
            piece = next(streams[i], None)
            if piece is None:
                pending.remove(i)
            else:
                texts[i] += piece
    assert texts == wanted


def test_results_say_how_they_ended(q4_model):
    (result,) = q4_model.complete(["Once upon a time"], max_tokens=5)
    assert isinstance(result, Generation)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 5
    assert result.prompt_tokens == len(q4_model.tokenizer.encode("Once upon a time"))
    assert result.text == q4_model.tokenizer.decode(result.token_ids)


def test_a_stop_string_ends_the_text_before_it(q4_model):
    text = q4_model.generate("Once upon a time", max_tokens=16)
    stop = text[8:12]
    assert stop in text
    (result,) = q4_model.complete(["Once upon a time"], max_tokens=16, stop=[stop])
    assert result.finish_reason == "stop"
    assert result.text == text[: text.index(stop)]
    assert len(result.token_ids) < 24
    assert (
        "".join(q4_model.generate("Once upon a time", max_tokens=16, stop=stop, stream=True)) == result.text
    )


def test_chat_is_generation_from_the_rendered_template(q4_model):
    messages = [{"role": "user", "content": "Who are you?"}]
    prompt = q4_model.chat_template.render(messages)
    assert prompt == "<s>User: Who are you?\nAssistant:"
    ids = q4_model.tokenizer.encode(prompt, add_special_tokens=False)
    wanted = q4_model.generate_tokens(ids, max_tokens=8).text
    assert q4_model.chat(messages, max_tokens=8) == wanted
    assert "".join(q4_model.chat(messages, max_tokens=8, stream=True)) == wanted


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate(["a", "b" * 20000]), "context"),
        (lambda m: m.generate([]), "no prompts"),
        (lambda m: m.generate("a", temperature=-1), "temperature"),
        (lambda m: m.generate("a", tempreature=1), "tempreature"),
        (lambda m: m.generate(3), "must be text"),
        (lambda m: m.generate([3]), "must be text"),
        (lambda m: m.generate_tokens([]), "empty"),
        (lambda m: m.generate_tokens([1.5]), "whole numbers"),
        (lambda m: m.generate_tokens([99999]), "vocabulary"),
        (lambda m: m.logits([]), "empty"),
        (lambda m: m.encode("a"), "decoder"),
        (lambda m: m.complete("a"), "list of prompts"),
    ],
)
def test_misuse_is_refused(q4_model, call, words):
    with pytest.raises(InvalidInputError, match=words):
        call(q4_model)
    assert not q4_model.engine.waiting
    assert not q4_model.engine.running


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "mps", 3.5])
def test_devices_that_are_not_there(tiny_q4, device):
    with pytest.raises(InvalidInputError):
        load(tiny_q4, device=device)


def test_a_folder_that_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="not a folder"):
        load(tmp_path / "nothing")


def test_without_a_tokenizer_there_are_token_ids(artifact, reseal, q4_model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (artifact / name).unlink()
    model = load(reseal(artifact), device="cpu")
    assert (
        model.generate_tokens([5, 6], max_tokens=4).token_ids
        == q4_model.generate_tokens([5, 6], max_tokens=4).token_ids
    )
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        model.generate("a")


@pytest.mark.parametrize(
    "code",
    [
        "import qcompiler.runtime",
        "import qcompiler; m = qcompiler.load({path!r}, device='cpu'); assert m.generate('a', max_tokens=2)",
        "import qcompiler.runtime.cli.main as c; assert c.run(['verify', {path!r}]) == 0",
    ],
)
def test_transformers_is_never_imported(tiny_q4, code):
    code = code.format(path=str(tiny_q4)) + "\nimport sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
