"""A quantized KV cache in the runtime: near the plain one, chosen at compilation or load, and checked."""

from __future__ import annotations

import json

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.kernels.formats.kv_cache import KV_FORMATS, kv_format
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.kv_bits import with_kv_bits
from qcompiler.runtime.model import load
from qcompiler.runtime.pages import page_specs
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.service import Request, Service

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
BITS = {"int8": "8", "int4": "4", "fp8": "fp8"}
# Mean KL divergence from the plain cache on TEXT, nats per token, with room for other texts.
NEAR = {"int8": 2e-3, "fp8": 1e-2, "int4": 2e-1}


@pytest.fixture(scope="module")
def models(tiny_float):
    """tiny-llama with a cache of each format, chosen at load."""
    limits = {"max_sequences": 4, "max_step_tokens": 64, "max_cache_tokens": 1024}
    return {
        name: load(tiny_float, device="cpu", verify="sizes", kv_bits=BITS[name], **limits)
        for name in KV_FORMATS
    }


def divergence(wanted, found):
    """Mean KL divergence of logits, nats per token."""
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("name", KV_FORMATS)
def test_logits_are_near_those_of_the_plain_cache(models, float_model, name):
    tokens = float_model.tokenizer.encode(TEXT)
    assert 0 < divergence(float_model.logits(tokens), models[name].logits(tokens)) < NEAR[name]


def test_eight_bits_rank_the_same_tokens_first(models, float_model):
    tokens = float_model.tokenizer.encode(TEXT)
    same = float_model.logits(tokens).argmax(-1) == models["int8"].logits(tokens).argmax(-1)
    assert same.float().mean() > 0.9
    assert models["int8"].generate("The", max_tokens=24) == float_model.generate("The", max_tokens=24)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_chunked_steps_give_what_one_step_gives(models, name):
    model = models[name]
    tokens = model.tokenizer.encode(TEXT)
    whole = model.logits(tokens)
    model.engine.max_step_tokens, before = 7, model.engine.max_step_tokens
    try:
        pieces = model.logits(tokens)
    finally:
        model.engine.max_step_tokens = before
    # another order of additions may round a value to the neighbouring code
    assert abs(divergence(whole, pieces)) < NEAR[name] / 20


def test_prompts_that_begin_alike_share_quantized_pages(models):
    model = models["int4"]
    prompt = model.tokenizer.encode(TEXT + " must be in want of a wife")
    with Service(model) as service:
        texts = []
        for _ in range(2):
            events = list(service.submit(Request(prompt, SamplingParams(max_tokens=8))))
            texts.append("".join(event.text for event in events))
        cached = service.stats().counters.cached_tokens
    assert texts[0] == texts[1]
    assert cached > 0


def test_the_cache_takes_the_bytes_that_its_format_says(models, float_model):
    plain, _ = page_specs(float_model.program.graph)
    for name, model in models.items():
        specs, _ = page_specs(model.program.graph)
        stored = sum(spec.token_bytes for spec in specs)
        channels = sum(spec.row[0] * spec.row[1] for spec in plain)
        assert stored * 8 == kv_format(name).bits_per_value(plain[0].row[1]) * channels
        pages = model.engine.executor.pages
        held = sum(page.nbytes for page in pages.values())
        assert held == model.engine.executor.num_pages * model.engine.executor.page_size * stored


def test_what_cannot_be_chosen_at_load_is_refused(tiny_float):
    graph = open_artifact(tiny_float, verify="sizes").graph
    assert with_kv_bits(graph, None) is graph
    assert with_kv_bits(graph, 16) is graph
    quantized = with_kv_bits(graph, 8)
    assert with_kv_bits(quantized, "8") is quantized
    with pytest.raises(InvalidInputError, match="compiled with a cache of int8"):
        with_kv_bits(quantized, 4)
    with pytest.raises(InvalidInputError, match="cannot have 5 bits"):
        with_kv_bits(graph, 5)


# Artifacts compiled with such a cache


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """tiny-llama as `qcompile --method none --kv-bits 4` leaves it."""
    from pathlib import Path

    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import compile_model

    folder = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
    out = tmp_path_factory.mktemp("art") / "tiny-kv4"
    options = CompileOptions(
        str(folder), method="none", bits=16, output=out, dtype="float32", kv_bits="4", eval_tokens=256
    )
    return compile_model(options), out


def test_the_report_tells_the_cache_and_its_quality(compiled):
    report, out = compiled
    assert report.kv_cache == "int4"
    assert report.quality.kl_mean > 1e-3  # the weights are as they were
    stored = json.loads((out / "report.json").read_text())
    assert stored["kv_cache"] == {"format": "int4", "bytes_per_token": 4 * 2 * 2 * (64 // 2 + 4)}
    assert stored["quality"]["kl_mean"] == report.quality.kl_mean


def test_compiled_and_chosen_at_load_are_the_same(compiled, models):
    _, out = compiled
    model = load(out, device="cpu")
    tokens = model.tokenizer.encode(TEXT)
    assert torch.equal(model.logits(tokens), models["int4"].logits(tokens))


def input_of(graph, name):
    return next(item for item in graph["inputs"] if item["name"] == name)


def resized_words(graph):
    input_of(graph, "v_pages_0")["shape"][3] *= 2


def other_heads(graph):
    input_of(graph, "k_scales_1")["shape"][2] += 1


def scales_without_low(graph):
    input_of(graph, "k_scales_0")["shape"].pop()


def wide_scales(graph):
    input_of(graph, "v_scales_0")["dtype"] = "float32"


def codes_of_another_type(graph):
    input_of(graph, "k_pages_2")["dtype"] = "int8"


def unknown_format(graph):
    node = next(n for n in graph["nodes"] if "kv_append_quantized" in n["op"])
    node["args"][-1] = "int2"


def another_format(graph):
    node = next(n for n in graph["nodes"] if n["op"] == "qcompiler.paged_attention_quantized.default")
    node["args"][10] = "int8"


def scales_that_are_computed(graph):
    node = next(n for n in graph["nodes"] if n["op"] == "qcompiler.paged_attention_quantized.default")
    node["args"][3] = node["args"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (resized_words, "v_pages_0"),
        (other_heads, "k_scales_1"),
        (scales_without_low, "k_scales_0"),
        (wide_scales, "v_scales_0"),
        (codes_of_another_type, "k_pages_2"),
        (unknown_format, "int2"),
        (another_format, "not a cache of format int8"),
        (scales_that_are_computed, "must be page inputs"),
    ],
)
def test_pages_and_scales_that_do_not_fit_are_refused_at_load(compiled, copy_of, reseal, change, told):
    folder = copy_of(compiled[1])
    graph = json.loads((folder / "graph.json").read_text())
    change(graph)
    (folder / "graph.json").write_text(json.dumps(graph))
    with pytest.raises(ArtifactError) as caught:
        load(reseal(folder), device="cpu")
    assert caught.value.exit_code == 2
    assert told in str(caught.value)
    assert "graph.json" in str(caught.value)
