"""The runtime on a GPU: the CPU's answers, with and without CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from qcompiler.runtime.batch import Span
from qcompiler.runtime.model import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["Once upon a time", "The", "It is a truth universally acknowledged", "fn main() {", "In"]


@pytest.fixture(scope="module", params=["q4", "float"])
def pair(request, tiny_q4, tiny_float):
    path = tiny_q4 if request.param == "q4" else tiny_float
    return load(path, device="cpu"), load(path, device="cuda")


def test_logits_equal_those_of_the_cpu(pair):
    cpu, gpu = pair
    ids = cpu.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20)
    torch.testing.assert_close(gpu.logits(ids), cpu.logits(ids), rtol=2e-2, atol=5e-2)


def test_decode_graphs_give_what_plain_steps_give(pair):
    _, gpu = pair
    executor = gpu.engine.executor
    prompts = [gpu.tokenizer.encode(p) for p in PROMPTS]
    pages = [[i] for i in range(len(prompts))]
    for prompt, own in zip(prompts, pages, strict=True):
        executor.run([Span(prompt, 0, own, [len(prompt) - 1])])
    spans = [Span([7], len(p), own, [0]) for p, own in zip(prompts, pages, strict=True)]
    for count in (1, 3, 5):  # padded to 1, 4 and 8 sequences
        replayed = executor.run(spans[:count]).clone()
        again = executor.run(spans[:count]).clone()
        executor._use_graphs = False
        plain = executor.run(spans[:count])
        executor._use_graphs = True
        assert torch.equal(replayed, again)
        torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-3)
    assert {size for size, _ in executor._graphs} >= {1, 4, 8}


def test_together_alone_and_without_graphs_are_the_same_text(pair):
    cpu, gpu = pair
    wanted = [cpu.generate(p, max_tokens=24) for p in PROMPTS]
    alone = [gpu.generate(p, max_tokens=24) for p in PROMPTS]
    plain = load(gpu.artifact.root, device="cuda", cuda_graphs=False, max_cache_tokens=4096)
    assert gpu.generate(PROMPTS, max_tokens=24) == alone
    assert plain.generate(PROMPTS, max_tokens=24) == alone
    assert alone == wanted


def test_the_cache_leaves_memory_free(pair):
    free, total = torch.cuda.mem_get_info()
    assert free > 0.05 * total
