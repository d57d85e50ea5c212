"""The whole list of passes on tiny models of many families, run with the reference ops.

Oracle: each sequence alone through transformers with the model's own eager
attention and its full context, in fp32.
"""

from __future__ import annotations

import pytest
import torch

from qcompiler.capture.matrix import eager_logits
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes import PassManager, QuantizeLinears, canonical_passes, lowering_passes, resolve

# Sums in another order, 2 layers deep; measured below 2e-6 everywhere.
TOLERANCE = 1e-5

# Prefill of 9, 1 and 5 tokens; two decode steps; a chunk, a pause and a decode mixed; a last chunk.
STEPS = [(9, 1, 5), (1, 1, 1), (1, 1, 1), (0, 7, 1), (5, 1, 0)]

# family → matches of rms_norm + layer_norm, rotary, gated activation, siblings, add_norm, rotary and append
DECODERS = {
    "llama": (5, 4, 2, 4, 4, 2),
    "gemma2": (9, 4, 2, 4, 4, 2),
    "qwen3": (9, 4, 2, 4, 4, 2),
    "phi3": (5, 4, 2, 0, 4, 2),
    "gpt2": (5, 0, 0, 0, 0, 0),
    "gpt_neox": (5, 4, 0, 0, 0, 2),
    "cohere": (7, 4, 2, 2, 0, 2),
    "glm4": (9, 4, 2, 2, 4, 2),
    "stablelm": (5, 4, 2, 4, 0, 2),
    "starcoder2": (5, 4, 0, 2, 0, 2),
    "olmo2": (9, 4, 2, 4, 1, 2),
    "gpt_oss": (5, 4, 0, 2, 4, 2),
    "deepseek_v3": (9, 4, 3, 4, 4, 0),
    "opt": (5, 0, 0, 2, 0, 0),
}
COUNTED = (
    "fuse_rotary",
    "fuse_gated_activation",
    "fuse_sibling_linears",
    "fuse_add_norm",
    "fuse_rotary_append",
)


@pytest.mark.parametrize("name", DECODERS)
def test_ragged_steps_over_a_paged_cache_equal_eager_full_context(lab, name):
    model = lab.family(name)
    results = PassManager([*canonical_passes(), *lowering_passes(model.kind)]).run(model.graph)
    matched = {result.name: result.matched for result in results}
    norms = matched["fuse_rms_norm"] + matched["fuse_layer_norm"]
    assert (norms, *(matched[key] for key in COUNTED)) == DECODERS[name]
    assert _worst(lab, model) < TOLERANCE


def _worst(lab, model, quantize=None):
    """Largest difference from eager over all steps and sequences."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 96, (20,), generator=generator) for _ in range(3)]
    sequences = lab.Sequences(model.graph, lab.RecipeRunner(model.graph, model.weights, quantize), prompts)
    worst = 0.0
    for counts in STEPS:
        logits = sequences.step(counts)
        live = [s for s, count in enumerate(counts) if count]
        for row, s in zip(logits, live, strict=True):
            context = prompts[s][None, : sequences.done[s]]
            worst = max(worst, lab.difference(row, eager_logits(model.model, context)[0, -1]))
    return worst


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_ragged_encoders_equal_eager_one_by_one(lab, name):
    model = lab.family(name)
    PassManager([*canonical_passes(), *lowering_passes(model.kind)]).run(model.graph)
    lengths = (9, 1, 5)
    tokens = torch.randint(3, 96, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    values = {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "token_type_ids": torch.zeros_like(tokens),
        "query_start": torch.tensor([0, 9, 10, 15], dtype=torch.int32),
        "max_query_len": 9,
    }
    names = [n.target for n in model.graph.graph.nodes if n.op == "placeholder"]
    assert names[-2:] == ["query_start", "max_query_len"]
    with torch.no_grad():
        got = lab.RecipeRunner(model.graph, model.weights).run(*(values[n] for n in names))
    wanted = torch.cat([eager_logits(model.model, part) for part in tokens.split(lengths, dim=1)], dim=1)
    assert lab.difference(got, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_quantized_model_equals_eager_with_its_dequantized_weights(lab, name):
    """Tied embeddings and Conv1D on meta: shapes and recipes first, numbers from the checkpoint after."""
    model = lab.family(name)
    spec = AffineSpec(4, 32)
    quantize_pass = QuantizeLinears(lambda layer, *_: "kept in full" if layer == "lm_head" else spec)
    PassManager([*canonical_passes(), quantize_pass, *lowering_passes()]).run(model.graph)
    format_, state = get_format("affine"), dict(model.model.state_dict())

    def quantize(recipe):
        weight = resolve(recipe.source, model.weights.__getitem__)
        rows, columns = weight.shape
        grouped = weight.view(rows, -1, spec.group_size)
        scales = ((grouped.amax(-1) - grouped.amin(-1)) / 15).half()
        zeros = (-grouped.amin(-1) / scales).half()
        codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        parts = format_.pack(spec, codes.view(rows, columns).to(torch.uint8), scales, zeros)
        dense = format_.dequantize(spec, parts, columns, torch.float32)
        state[recipe.source.source] = dense.t() if recipe.source.transposed else dense
        return parts

    runner = lab.RecipeRunner(model.graph, model.weights, quantize)
    for node in model.graph.graph.nodes:
        if node.op == "get_attr":
            runner.fetch_attr(node.target)
    plain = {k: v.clone() for k, v in model.weights.items()}
    model.model.load_state_dict(state)
    model.weights = plain
    assert _worst(lab, model, quantize) < TOLERANCE
