"""Families of the support matrix: captured, lowered, written, loaded, run by the engine."""

from __future__ import annotations

import os

import pytest
import torch

from qcompiler.capture import ModelSource, capture
from qcompiler.capture.matrix import SUPPORTED, eager_logits, eager_model, relative_difference
from qcompiler.emit.artifact import ArtifactInfo, write_artifact
from qcompiler.emit.graph_json import graph_weights
from qcompiler.passes import PassManager, canonical_passes, lowering_passes, resolve
from qcompiler.passes.weights import recipe_of
from qcompiler.runtime.batch import Span
from qcompiler.runtime.memory import make_executor
from qcompiler.runtime.model import load

# One of each kind of trouble; QCOMPILER_ALL_FAMILIES=1 runs the rest as well.
USUAL = {"gpt2", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "phi3", "bert", "modernbert"}
FAMILIES = [f for f in SUPPORTED if f.name in USUAL or os.environ.get("QCOMPILER_ALL_FAMILIES")]


def compile_family(family, out):
    source = ModelSource.from_config(family.config())
    captured = capture(source, torch.float32)
    model = eager_model(source)
    PassManager([*canonical_passes(), *lowering_passes(captured.kind)]).run(captured.graph)
    state = model.state_dict()
    held = [*captured.graph.named_parameters(), *captured.graph.named_buffers()]
    state.update({name: t.detach() for name, t in held if not t.is_meta})
    weights = (
        (n, resolve(recipe_of(captured.graph, n), state.__getitem__)) for n in graph_weights(captured.graph)
    )
    info = ArtifactInfo(
        captured.kind, "float32", family.model_type, captured.vocab_size, captured.max_positions or 64
    )
    write_artifact(out, captured.graph, weights, info=info)
    return model


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_gives_its_eager_logits(family, tmp_path):
    eager = compile_family(family, tmp_path / "a")
    model = load(tmp_path / "a", device="cpu")
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (1, 23, 9)]
    wanted = [eager_logits(eager, torch.tensor([p]))[0] for p in prompts]
    if model.kind == "encoder":
        for got, expected in zip(model._encode(prompts), wanted, strict=True):
            assert relative_difference(got, expected) < 1e-5
        return
    for prompt, expected in zip(prompts, wanted, strict=True):
        assert relative_difference(model.logits(prompt), expected) < 1e-5

    # As an engine computes them: prompts in pieces, then one token at a time, all in ragged steps.
    executor, _ = make_executor(model.program, max_context=64, max_sequences=4, max_cache_tokens=192)
    starts = [0, 0, 0]
    got = [torch.zeros_like(w) for w in wanted]
    while any(s < len(p) for s, p in zip(starts, prompts, strict=True)):
        spans, where = [], []
        for i, prompt in enumerate(prompts):
            count = min(7 if starts[i] == 0 else 5 if starts[i] < 12 else 1, len(prompt) - starts[i])
            if count:
                pages = list(range(i * 4 + 3, i * 4 - 1, -1))
                spans.append(Span(prompt[starts[i] : starts[i] + count], starts[i], pages, range(count)))
                where.append((i, starts[i], count))
                starts[i] += count
        logits = executor.run(spans)
        row = 0
        for i, start, count in where:
            got[i][start : start + count] = logits[row : row + count]
            row += count
    for g, w in zip(got, wanted, strict=True):
        assert relative_difference(g, w) < 1e-5
