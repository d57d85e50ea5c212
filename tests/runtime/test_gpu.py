"""The runtime on a GPU: the CPU's answers, with and without CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from qcompiler.runtime.batch import Span
from qcompiler.runtime.model import load
from qcompiler.runtime.sampling import SamplerState, SamplingParams, greedy, sample

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


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_launched_ahead_say_what_steps_in_order_say(pair, graphs):
    """Greedy, drawn and penalized tokens, ends at different moments, prompts that come late."""
    _, gpu = pair
    engine = gpu.engine
    kinds = [
        {}, {"temperature": 0.8, "seed": 1}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 2},
        {"stop_token_ids": tuple(range(3, 200, 4))}, {"repetition_penalty": 1.2},
    ]  # fmt: skip
    answers = {}
    for ahead in (False, True):
        for mixed in (False, True):
            engine.ahead, engine.executor._use_graphs = ahead, graphs
            sequences = []
            for number, text in enumerate(PROMPTS * 3):
                options = kinds[number % len(kinds) if mixed else number % 2]
                params = SamplingParams(max_tokens=10 + 3 * number, **options)
                sequences.append(engine.add(gpu.tokenizer.encode(text), params))
                engine.step()
            engine.run(sequences)
            answers[ahead, mixed] = [(s.generated, s.finish_reason) for s in sequences]
            assert engine.allocator.available == engine.allocator.num_pages
    engine.ahead, engine.executor._use_graphs = True, True
    assert answers[True, False] == answers[False, False]
    assert answers[True, True] == answers[False, True]


def test_the_host_waits_for_nothing_but_the_step_before(pair):
    """A whole generation under a mode in which every hidden wait for the device is an error."""
    _, gpu = pair
    engine = gpu.engine
    prompts = [gpu.tokenizer.encode(p) for p in PROMPTS]
    for options in ({}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 4}):
        expected = gpu.generate_tokens(prompts, max_tokens=20, **options)  # captures graphs
        sequences = [engine.add(p, SamplingParams(max_tokens=20, **options)) for p in prompts]
        while not all(s.generated for s in sequences):
            engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.run(sequences)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [s.generated for s in sequences] == [g.token_ids for g in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equally_likely_tokens_are_told_apart_as_on_the_cpu(dtype):
    logits = torch.randint(0, 4, (9, 5001)).to(dtype)
    logits[3, 70] = float("nan")
    logits[4] = -float("inf")
    logits[5, 3000] = float("inf")
    assert greedy(logits.cuda()).tolist() == greedy(logits).tolist()
    assert greedy(logits)[3:6].tolist() == [-1, -1, -1]
    params = [SamplerState(SamplingParams())] * 9
    assert sample(logits.cuda(), params, [[]] * 9) == greedy(logits).tolist()
