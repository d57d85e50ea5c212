"""The runtime on a GPU: the CPU's answers, with and without CUDA graphs."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from qcompiler.runtime import sampling, tensorfile
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.batch import Span
from qcompiler.runtime.model import load
from qcompiler.runtime.sampling import SamplerState, SamplingParams, greedy, sample
from qcompiler.runtime.service import Request, Service

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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_gpu_captures_its_own_steps(pair):
    _, gpu = pair
    second = load(gpu.artifact.root, device="cuda:1", max_cache_tokens=4096)
    assert second.generate(PROMPTS, max_tokens=24) == gpu.generate(PROMPTS, max_tokens=24)
    assert second.engine.executor._use_graphs
    with Service(second) as service:  # its thread's current device is the first
        found = service.generate(Request(second.tokenizer.encode(PROMPTS[0]), SamplingParams(max_tokens=24)))
        assert found.text == gpu.generate(PROMPTS[0], max_tokens=24)


def test_the_cache_leaves_memory_free(pair):
    free, total = torch.cuda.mem_get_info()
    assert free > 0.05 * total


# Each way to run a step: launched ahead, captured, tokens by our kernels, drawn by ours. The first is plain.
ROADS = [
    (False, False, False, False),
    (False, True, False, False),
    (True, False, False, False),
    (True, True, False, False),
    (True, True, True, False),
    (True, True, True, True),
    (True, False, True, True),
    (False, True, True, True),
]


@contextlib.contextmanager
def road(model, ahead, graphs, kernels, drawn):
    engine, executor = model.engine, model.engine.executor
    before = engine.ahead, executor._use_graphs, executor._token_kernels, executor._graphs
    engine.ahead, executor._use_graphs, executor._token_kernels = ahead, graphs, kernels
    if kernels != before[2]:
        executor._graphs = {}
    was, sampling.DRAW_KERNEL = sampling.DRAW_KERNEL, drawn
    try:
        yield
    finally:
        engine.ahead, executor._use_graphs, executor._token_kernels, executor._graphs = before
        sampling.DRAW_KERNEL = was


def test_every_road_of_a_step_says_the_same(pair):
    """Greedy, drawn and penalized tokens, ends at different moments, prompts that come late."""
    _, gpu = pair
    engine = gpu.engine
    kinds = [
        {}, {"temperature": 0.8, "seed": 1}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 2},
        {"stop_token_ids": tuple(range(3, 200, 4))}, {"repetition_penalty": 1.2},
    ]  # fmt: skip
    answers = {}
    for settings in ROADS:
        with road(gpu, *settings):
            for kind in (kinds[:1], kinds[:3], kinds):
                sequences = []
                for number, text in enumerate(PROMPTS * 3):
                    params = SamplingParams(max_tokens=10 + 3 * number, **kind[number % len(kind)])
                    sequences.append(engine.add(gpu.tokenizer.encode(text), params))
                    engine.step()
                engine.run(sequences)
                answers[settings, len(kind)] = [(s.generated, s.finish_reason) for s in sequences]
                assert engine.allocator.available == engine.allocator.num_pages
    different = [key for key, found in answers.items() if found != answers[ROADS[0], key[1]]]
    assert not different, "(ahead, graphs, token kernels, draw kernel), kinds of sampling"


@pytest.mark.parametrize("settings", [ROADS[1], ROADS[3], ROADS[5]], ids=str)
def test_a_service_gives_every_page_back_on_every_road(pair, settings):
    _, gpu = pair
    with road(gpu, *settings):
        expected = [gpu.generate_tokens(gpu.tokenizer.encode(p), max_tokens=20).token_ids for p in PROMPTS]
        with Service(gpu) as service:
            requests = [Request(gpu.tokenizer.encode(p), SamplingParams(max_tokens=20)) for p in PROMPTS * 3]
            streams = [service.submit(request) for request in requests]
            streams[1].cancel()
            found = [[e.token for e in stream][:-1] for stream in streams[2:]]
            service.check()
            while service.stats().running or service.stats().waiting:
                time.sleep(0.01)
            assert service.scheduler.pool.held == 0
        assert found == (expected * 3)[2:]


def test_a_warm_model_has_captured_what_was_asked_for(tiny_q4):
    warm = load(tiny_q4, device="cuda", max_sequences=9, max_cache_tokens=2048, warm_up=True)
    assert {size for size, _ in warm.engine.executor._graphs} == {1, 2, 4, 8, 16}
    some = load(tiny_q4, device="cuda", max_sequences=9, max_cache_tokens=2048, warm_up=[1, 3])
    graphs = dict(some.engine.executor._graphs)
    assert {size for size, _ in graphs} == {1, 4}
    assert {"weights", "cache", "graphs"} <= set(some.cold_start.phases)
    assert warm.generate(PROMPTS, max_tokens=8) == some.generate(PROMPTS, max_tokens=8)
    in_order = load(tiny_q4, device="cuda", max_cache_tokens=2048, ahead=False)
    assert in_order.engine.ahead is False
    assert in_order.generate(PROMPTS, max_tokens=8) == some.generate(PROMPTS, max_tokens=8)


@pytest.mark.parametrize("staged", [True, False])
def test_weights_on_the_gpu_are_those_of_the_file(tiny_q4, monkeypatch, staged):
    monkeypatch.setattr(tensorfile, "STAGED", staged)
    reader = open_artifact(tiny_q4, verify="sizes").tensors
    for _ in range(3):
        on_gpu = {name: reader.read(name, torch.device("cuda", 0)) for name in reader.entries}
        for name, tensor in on_gpu.items():
            assert torch.equal(tensor.cpu(), reader.read(name)), name
    reader.close()


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
