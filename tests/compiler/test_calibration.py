"""The calibration block runner: where it cuts, what it carries, what it measures, and how it resumes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from qcompiler.calibration import (
    BlockResult,
    CalibrationSettings,
    calibrate,
    cut_blocks,
)
from qcompiler.calibration.blocks import run_nodes
from qcompiler.calibration.runner import MemoryStore
from qcompiler.capture import ModelSource, capture
from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.workspace import Workspace

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TOKENS = [(7 * i * i + 3 * i) % 2048 for i in range(600)]
SETTINGS = CalibrationSettings(context=32, tokens=96)


@pytest.fixture(scope="module")
def tiny():
    source = ModelSource.from_pretrained(TINY)
    return capture(source, torch.float32).graph, source.checkpoint.tensor


class Rounding:
    """A method that rounds to 8 bits, and remembers the tasks that it was given."""

    name = "rounding"

    def __init__(self, fail_in: str = ""):
        self.seen: list[str] = []
        self.inputs: list[torch.Tensor] = []
        self.fail_in = fail_in

    def quantize_block(self, task):
        if task.name == self.fail_in:
            raise KeyboardInterrupt
        self.seen.append(task.name)
        tensors, weights = {}, {}
        for stage in task.stages():
            moments = task.moments(stage, weights)
            self.inputs.append(moments.gram)
            for linear in stage:
                weight = task.weights[linear.weight]
                scale = (weight.abs().amax(1, keepdim=True) / 127).half().float()
                codes = ((weight / scale).round() + 128).clamp(0, 255).to(torch.uint8)
                stored = AFFINE.pack(task.specs[linear.name], codes, scale, torch.full_like(scale, 128.0))
                tensors[linear.name] = stored
                weights[linear.weight] = AFFINE.dequantize(
                    task.specs[linear.name], stored, linear.in_features, torch.float32
                )
        norm = task.tunable()[0]
        return BlockResult(tensors, dict(task.specs), {**weights, norm: task.weights[norm] * 1.5}, {"n": 1})


def choose(name, out_features, in_features):
    return "kept" if name.endswith("o_proj") else AffineSpec(8, 0)


def test_blocks_are_the_decoder_layers(tiny):
    gm, _ = tiny
    first, blocks, last = cut_blocks(gm)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(4)]
    assert [[x.name.rsplit(".", 1)[1] for x in stage] for stage in blocks[2].stages()] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert "model.embed_tokens.weight" in first.parameters
    assert {"model.norm.weight"} <= set(last.parameters)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [n for piece in (first, *blocks, last) for n in piece.nodes] == calls


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen3_moe", "bert"])
def test_other_architectures_are_cut_the_same_way(kind):
    from transformers import CONFIG_MAPPING

    small = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 64, "head_dim": 16, "n_embd": 32, "n_layer": 3, "n_head": 2,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0,
    }  # fmt: skip
    gm = capture(ModelSource.from_config(CONFIG_MAPPING[kind](**small)), torch.float32).graph
    _, blocks, _ = cut_blocks(gm)
    assert [int(block.name.rsplit(".", 1)[1]) for block in blocks] == [0, 1, 2]
    # One hidden state crosses from block to block; everything else that is read is known from the start.
    for before, after in itertools.pairwise(blocks):
        assert len(set(before.writes) & set(after.reads)) == 1


def test_a_graph_without_a_list_of_blocks_is_refused():
    gm = torch.fx.symbolic_trace(torch.nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="cannot be cut into blocks"):
        cut_blocks(gm)


def test_blocks_one_by_one_give_the_whole_model(tiny):
    """The float stream behind the last block, put through the rest, equals one run of the whole graph."""
    gm, load = tiny
    method = Rounding()
    taken = []
    original = Rounding.quantize_block

    def spy(self, task):
        taken.append(task.target(0)[0])
        return original(self, task)

    method.quantize_block = spy.__get__(method)
    calibrate(gm, load, TOKENS, method, choose, SETTINGS)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    ids, positions = (node for node in gm.graph.nodes if node.op == "placeholder")
    window = SETTINGS.windows(TOKENS)[0]

    def fetch(name):
        path, _, leaf = name.rpartition(".")
        held = getattr(gm.get_submodule(path), leaf)
        return load(name).float() if held.is_meta else held

    wanted = [block.writes[0] for block in cut_blocks(gm)[1]]
    whole = run_nodes(calls, {ids: window, positions: torch.arange(32)[None]}, fetch, wanted)
    for node, found in zip(wanted, taken, strict=True):
        torch.testing.assert_close(found, whole[node], rtol=1e-5, atol=1e-5)


def test_moments_see_the_quantized_prefix(tiny):
    gm, load = tiny
    exact, rounded = Rounding(), Rounding()
    calibrate(gm, load, TOKENS, exact, lambda *_: "kept", SETTINGS)
    outcome = calibrate(gm, load, TOKENS, rounded, choose, SETTINGS)
    assert exact.inputs == []
    assert len(rounded.inputs) == 4 * 3
    assert outcome.skipped == {f"model.layers.{i}.self_attn.o_proj": "kept" for i in range(4)}
    # The tuned norm of block 0 is 1.5 times larger: it stands in the input of nothing but what follows.
    assert outcome.parameters == [f"model.layers.{i}.input_layernorm.weight" for i in range(4)]
    norm = load("model.layers.2.input_layernorm.weight").float()
    torch.testing.assert_close(outcome.parameter("model.layers.2.input_layernorm.weight"), 1.5 * norm)


def test_an_interrupted_run_resumes_at_the_block_it_was_in(tiny, tmp_path):
    gm, load = tiny
    whole = calibrate(gm, load, TOKENS, Rounding(), choose, SETTINGS)
    with (
        pytest.raises(KeyboardInterrupt),
        Workspace(tmp_path / "out", {"x": 1}, resume=False, overwrite=False) as store,
    ):
        calibrate(gm, load, TOKENS, Rounding(fail_in="model.layers.3"), choose, SETTINGS, store=store)
    method = Rounding()
    with Workspace(tmp_path / "out", {"x": 1}, resume=True, overwrite=False) as store:
        resumed = calibrate(gm, load, TOKENS, method, choose, SETTINGS, store=store)
        assert method.seen == ["model.layers.3"]
        assert set(resumed.specs) == set(whole.specs)
        for name in whole.specs:
            for part, tensor in whole.tensors(name).items():
                assert torch.equal(resumed.tensors(name)[part], tensor), (name, part)


def test_windows_spread_over_the_text():
    windows = CalibrationSettings(context=10, tokens=30).windows(list(range(107)))
    assert [int(window[0, 0]) for window in windows] == [0, 40, 90]
    assert all(window.shape == (1, 10) for window in windows)
    with pytest.raises(InvalidInputError, match="less than one window"):
        CalibrationSettings(context=10).windows([1, 2, 3])


def test_memory_store_forgets_nothing():
    store = MemoryStore()
    assert store.finished("a") is None
    store.store("a", {"t": torch.ones(2)}, {"k": 1})
    assert store.finished("a") == {"k": 1}
    assert torch.equal(store.load("a")["t"], torch.ones(2))
