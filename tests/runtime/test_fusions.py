"""Fused and unfused graphs of the shipped model say the same: perplexity and greedy text."""

from __future__ import annotations

import json

import pytest
import torch

from qcompiler.runtime.evaluate import evaluate
from qcompiler.runtime.model import load

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 6
PROMPTS = ["Once upon a time", "It is a truth", "The"]
# Fused ops of the lowered graph, and the plain ones that they stand for.
FUSED = {"linear_affine_gated", "rotary_kv_append", "add_rms_norm"}
PLAIN = {"silu_mul", "rotary", "kv_append"}

_cuda = pytest.param(
    "cuda",
    torch.float16,
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, compile_tiny):
    """Compiles with and without fusions, once for each dtype."""
    made = {}

    def get(dtype):
        if dtype not in made:
            parent = tmp_path_factory.mktemp("fused")
            made[dtype] = [
                compile_tiny(parent / name, bits=4, dtype=dtype, fuse=fuse)
                for name, fuse in (("fused", True), ("unfused", False))
            ]
        return made[dtype]

    return get


def ops_of(folder):
    graph = json.loads((folder / "graph.json").read_text())
    return {node["op"].removeprefix("qcompiler.").removesuffix(".default") for node in graph["nodes"]}


def test_fusions_can_be_left_out(folders):
    fused, unfused = map(ops_of, folders(torch.float32))
    assert fused >= FUSED
    assert not fused & PLAIN
    assert unfused >= PLAIN
    assert not unfused & FUSED


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), _cuda])
def test_perplexity_and_greedy_text_are_the_same(folders, device, dtype, kv_bits):
    fused, unfused = (load(folder, device=device, kv_bits=kv_bits) for folder in folders(dtype))
    figures = [evaluate(model, TEXT, context=64).perplexity for model in (fused, unfused)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    if dtype == torch.float32:  # 16-bit sums in another order may tip a close choice
        texts = [model.generate(PROMPTS, max_tokens=24, temperature=0) for model in (fused, unfused)]
        assert texts[0] == texts[1]
