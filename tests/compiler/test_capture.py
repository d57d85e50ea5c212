"""The captured graph itself: its signature, names, buffers, and what it no longer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcompiler.capture import CapturedModel, ModelSource, capture
from qcompiler.capture.interpret import GraphRunner
from qcompiler.capture.matrix import Family, eager_logits, eager_model, inputs, relative_difference
from qcompiler.kernels.errors import UnsupportedModelError

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def llama() -> CapturedModel:
    return capture(ModelSource.from_pretrained(TINY_LLAMA))


def placeholders(captured: CapturedModel) -> list[str]:
    return [str(node.target) for node in captured.graph.graph.nodes if node.op == "placeholder"]


def calls(captured: CapturedModel, target: str) -> list[torch.fx.Node]:
    return [node for node in captured.graph.graph.nodes if str(node.target) == target]


def test_decoder_takes_ids_and_positions_and_gives_logits(llama: CapturedModel) -> None:
    assert llama.kind == "decoder"
    assert placeholders(llama) == ["input_ids", "position_ids"]
    ids = next(iter(llama.graph.graph.nodes)).meta["val"]
    assert ids.shape[0] == 1
    assert isinstance(ids.shape[1], torch.SymInt)
    [output] = [node for node in llama.graph.graph.nodes if node.op == "output"]
    assert output.args[0].meta["val"].shape[-1] == llama.vocab_size == 2048


def test_encoder_takes_token_types_where_the_model_has_them() -> None:
    bert = capture(ModelSource.from_config(Family("bert").config()))
    assert bert.kind == "encoder"
    assert placeholders(bert) == ["input_ids", "position_ids", "token_type_ids"]
    assert all(node.args[4] is False for node in calls(bert, "qcompiler.attention.default"))


def test_weights_are_meta_under_their_state_dict_names(llama: CapturedModel) -> None:
    model = ModelSource.from_pretrained(TINY_LLAMA).skeleton()
    names = {name for name, _ in llama.graph.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    assert all(parameter.is_meta for parameter in llama.graph.parameters())


def test_tied_weight_stands_under_one_name_in_both_places(llama: CapturedModel) -> None:
    assert llama.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    [node] = [node for node in llama.graph.graph.nodes if node.target == "model.embed_tokens.weight"]
    assert {str(user.target) for user in node.users} == {"aten.embedding.default", "aten.linear.default"}


def test_every_node_says_what_it_yields_and_ops_where_they_come_from(llama: CapturedModel) -> None:
    nodes = [node for node in llama.graph.graph.nodes if node.op not in ("output", "get_attr")]
    assert all("val" in node.meta for node in llama.graph.graph.nodes if node.op != "output")
    [*_, (path, kind)] = calls(llama, "aten.silu.default")[0].meta["nn_module_stack"].values()
    assert path == "model.layers.0.mlp.act_fn"
    assert kind.endswith(("SiLUActivation", "SiLU"))
    assert nodes


def test_nothing_is_left_of_tracing(llama: CapturedModel) -> None:
    for node in llama.graph.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if node.op == "call_function":
            assert "assert" not in str(node.target)
            assert not isinstance(node.target, torch._ops.HigherOrderOperator)
            assert node.users, f"{node} is dead"


@pytest.mark.parametrize(
    "family",
    [
        Family("llama"),
        Family("gemma3_text", {"head_dim": 16, "sliding_window": 6}),
        Family("cohere2", {"sliding_window": 6}),
        Family("gpt_oss", {"num_local_experts": 4, "head_dim": 16}),
        Family("bert"),
        Family("nemotron"),
    ],
    ids=lambda family: family.name,
)
def test_computed_buffers_equal_the_real_models(family: Family) -> None:
    source = ModelSource.from_config(family.config())
    captured = capture(source, torch.bfloat16)
    model = source.model_class._from_config(source.config, dtype=torch.bfloat16)
    persistent = set(model.state_dict())
    computed = {name: value for name, value in captured.graph.named_buffers() if name not in persistent}
    for name, value in computed.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, model.get_buffer(name)), name
    assert computed or family.model_type == "bert"


def test_capture_costs_no_weight_memory() -> None:
    """An 8B shape is captured on the meta device; a real copy would take 32 GB."""
    config = Family(
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ).config()
    captured = capture(ModelSource.from_config(config), torch.bfloat16)
    assert all(parameter.is_meta for parameter in captured.graph.parameters())
    assert sum(buffer.nbytes for buffer in captured.graph.buffers()) < 1 << 20


def test_dtype_follows_the_argument_then_the_config() -> None:
    source = ModelSource.from_config(Family("llama").config())
    assert {p.dtype for p in capture(source, torch.bfloat16).graph.parameters()} == {torch.bfloat16}
    assert capture(source, torch.float16).dtype == torch.float16


def test_parameters_that_must_stay_fp32_do() -> None:
    """DeepSeek's routing bias is kept in fp32 by from_pretrained whatever the dtype."""
    options = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
    }
    source = ModelSource.from_config(Family("deepseek_v3", options).config())
    pinned = source.model_class(source.config)._keep_in_fp32_modules_strict
    if not any("e_score_correction_bias" in name for name in pinned or ()):
        pytest.skip("this transformers does not pin it")
    attributes = dict(capture(source, torch.bfloat16).graph.named_buffers())
    assert attributes["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_window_softcap_sinks_and_chunks_reach_the_op() -> None:
    def attention(model_type: str, options: dict[str, object]) -> list[tuple[object, ...]]:
        captured = capture(ModelSource.from_config(Family(model_type, options).config()))
        return [node.args[4:8] for node in calls(captured, "qcompiler.attention.default")]

    two = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16, "sliding_window": 6}
    assert attention("gemma2", {**two, "attn_logit_softcapping": 2.0}) == [
        (True, 6, 0, 2.0),
        (True, 0, 0, 2.0),
    ]
    chunked = {
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "moe_layers": [1],
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    }
    assert attention("llama4_text", chunked) == [(True, 0, 8, 0.0), (True, 0, 0, 0.0)]
    captured = capture(ModelSource.from_config(Family("gpt_oss", {**two, "num_local_experts": 4}).config()))
    sinks = [node.args[8].args[0] for node in calls(captured, "qcompiler.attention.default")]
    assert [str(node.target) for node in sinks] == [f"model.layers.{i}.self_attn.sinks" for i in (0, 1)]


def test_experts_are_grouped_linears_over_3d_weights() -> None:
    captured = capture(ModelSource.from_config(Family("mixtral", {"num_local_experts": 4}).config()))
    grouped = calls(captured, "qcompiler.grouped_linear.default")
    assert len(grouped) == 4
    assert all(len(node.args[1].meta["val"].shape) == 3 for node in grouped)


# Rotary types whose frequencies depend on the length.

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    }
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


def rotary(options: dict[str, object]) -> ModelSource:
    """A model with a rotary type: longrope is phi3's, dynamic may stand in any llama."""
    if options is LONGROPE:
        options = {**options, "original_max_position_embeddings": 16}
    return ModelSource.from_config(Family("phi3" if options is not DYNAMIC else "llama", options).config())


@pytest.mark.parametrize(("options", "kind"), [(LONGROPE, "longrope"), (DYNAMIC, "dynamic")])
def test_length_dependent_rotary_is_refused_without_a_context(options: dict[str, object], kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=kind) as refusal:
        capture(rotary(options))
    assert "max_context" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "max_context", "length"),
    [(LONGROPE, 16, 16), (LONGROPE, 64, 40), (DYNAMIC, 64, 40)],
    ids=["longrope short", "longrope long", "dynamic"],
)
def test_frozen_rotary_equals_eager_at_that_length(
    options: dict[str, object], max_context: int, length: int
) -> None:
    source = rotary(options)
    captured = capture(source, torch.float32, max_context=max_context)
    assert captured.max_positions == max_context
    assert str(max_context) in captured.notes[0]
    model = eager_model(source)
    tokens = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(2))
    got = GraphRunner(captured.graph, model.state_dict().__getitem__).logits(
        *inputs(captured, tokens, (length,))
    )
    assert relative_difference(got, eager_logits(model, tokens)) < 1e-5


def test_dynamic_rotary_beyond_its_original_context_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        capture(rotary(DYNAMIC), max_context=65)
