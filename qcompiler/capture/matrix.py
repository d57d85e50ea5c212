"""The support matrix: tiny models of many families, captured and compared with transformers' own eager run.

`python -m qcompiler.capture.matrix docs/support-matrix.md` writes the table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qcompiler.capture.export import CapturedModel, capture
from qcompiler.capture.interpret import GraphRunner
from qcompiler.capture.source import ModelSource

LENGTHS = (1, 7, 21)
RAGGED = (9, 1, 5)

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    Attributes:
        model_type: transformers' model type.
        options: Config values beyond the common tiny ones.
        shows: What of attention or layout this row exercises.
        label: Name of the row; the model type unless a type has several rows.
        architecture: Class to capture where it is not the default of the type.
        since: First transformers release whose model can be captured.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    label: str = ""
    architecture: str | None = None
    since: str = "5.10"

    @property
    def name(self) -> str:
        """Row name."""
        return self.label or self.model_type

    def config(self) -> Any:
        """The tiny config."""
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, **{**_COMMON, **self.options})
        if self.architecture:
            config.architectures = [self.architecture]
        return config


_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

SUPPORTED: tuple[Family, ...] = (
    Family("llama", shows="grouped heads"),
    Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "llama3 rotary",
        "llama (llama3 rotary)",
    ),
    Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "yarn rotary",
        "llama (yarn rotary)",
    ),
    Family(
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        "linear rotary",
        "llama (linear rotary)",
    ),
    Family("qwen2", {"tie_word_embeddings": True}, "tied embeddings"),
    Family("qwen3", {"head_dim": 24}, "head_dim ≠ hidden / heads, q/k norm"),
    Family("mistral", {"sliding_window": 6}, "sliding window"),
    Family("gemma", {"head_dim": 16}, "tied, scaled embeddings"),
    Family(
        "gemma2",
        {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "soft caps, window on every other layer",
    ),
    Family(
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "window, rotary per layer type",
    ),
    Family("phi", shows="parallel block, partial rotary"),
    Family("phi3", {"sliding_window": 6}, "packed qkv and gate/up, window"),
    Family("gpt2", {"n_inner": 96}, "Conv1D, learned positions"),
    Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "learned positions with offset"),
    Family("gpt_neox", shows="packed heads, partial rotary"),
    Family("mixtral", {"num_local_experts": 4, "sliding_window": 6}, "experts, window"),
    Family(
        "qwen2_moe",
        {"num_experts": 4, **_MOE, "shared_expert_intermediate_size": 32},
        "experts, shared expert",
    ),
    Family("qwen3_moe", {"num_experts": 4, **_MOE, "head_dim": 16}, "experts"),
    Family("olmo", shows="norm without weight"),
    Family("olmo2", shows="norm after the block"),
    Family("olmo3", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}, "window"),
    Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "experts"),
    Family(
        "granite",
        {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        "own scales",
    ),
    Family("granitemoe", {"num_local_experts": 4}, "experts", since="5.17"),
    Family("cohere", {"use_qk_norm": True}, "interleaved rotary, parallel block"),
    Family(
        "cohere2",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "window, no rotary on full layers",
    ),
    Family("stablelm", shows="partial rotary"),
    Family("starcoder2", {"sliding_window": 6}, "window, biases"),
    Family("smollm3", {"no_rope_layers": [1, 0]}, "no rotary on some layers"),
    Family(
        "gpt_oss",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "sinks, window, experts with biases",
    ),
    Family(
        "deepseek_v2",
        {
            "n_routed_experts": 4,
            **_MOE,
            **_MLA,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
        },
        "head_dim ≠ v_dim, experts",
        since="5.17",
    ),
    Family(
        "deepseek_v3",
        {"n_routed_experts": 4, **_MOE, **_MLA, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        "head_dim ≠ v_dim, experts",
    ),
    Family("glm", {"head_dim": 16}, "interleaved partial rotary"),
    Family("glm4", {"head_dim": 16}, "interleaved partial rotary, four norms"),
    Family(
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            **_MOE,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        "experts",
    ),
    Family(
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "moe_layers": [1],
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
        "chunked attention, complex rotary, query scale by position, experts",
    ),
    Family("nemotron", shows="LayerNorm with weight + 1, squared ReLU"),
    Family("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, "one key head"),
    Family(
        "exaone4", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}, "window"
    ),
    Family("ernie4_5", {"head_dim": 16}, "interleaved rotary"),
    Family("hunyuan_v1_dense", {"head_dim": 16}, "q/k norm after rotary"),
    Family("seed_oss", {"head_dim": 16}, "biases"),
    Family("arcee", shows="squared ReLU"),
    Family("helium", {"head_dim": 16}, "interleaved rotary"),
    Family("persimmon", shows="squared ReLU, q/k norm"),
    Family("phimoe", {"num_local_experts": 4, "sliding_window": 6}, "experts, LayerNorm"),
    Family(
        "dots1",
        {
            "n_routed_experts": 4,
            **_MOE,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
            "n_shared_experts": 1,
        },
        "experts",
    ),
    Family("ministral3", {"head_dim": 16}, "query scale by position"),
    Family("biogpt", shows="learned positions, a padding mask of ones"),
    Family("apertus", shows="xIELU"),
    Family("bitnet", shows="norms inside the block"),
    Family("diffllama", shows="differential attention"),
    Family("gemma4_text", {"head_dim": 16, "sliding_window": 6}, "window, head_dim per layer type"),
    Family("vaultgemma", {"head_dim": 16, "sliding_window": 6}, "window"),
    Family("modernbert-decoder", {"local_attention": 8}, "window"),
    Family("ctrl", {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96}, "sinusoidal positions"),
    Family("bert", shows="bidirectional, token types"),
    Family("bert", {}, "bidirectional, no head", "bert (bare)", "BertModel"),
    Family("roberta", {"type_vocab_size": 1, "pad_token_id": 1}, "positions from pad + 1"),
    Family("xlm-roberta", {"type_vocab_size": 1, "pad_token_id": 1}, "positions from pad + 1"),
    Family("electra", {"embedding_size": 32}, "bidirectional"),
    Family("distilbert", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}, "bidirectional"),
    Family("camembert", {"type_vocab_size": 1, "pad_token_id": 1}, "positions from pad + 1"),
    Family("modernbert", {"local_attention": 8, "global_attn_every_n_layers": 2}, "bidirectional window"),
    Family("albert", {"embedding_size": 32}, "shared layers"),
    Family("nomic_bert", {}, "bidirectional rotary"),
    Family(
        "esm",
        {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 3},
        "bidirectional rotary",
    ),
    Family("eurobert", {}, "bidirectional rotary"),
)

# Families that must be refused, each showing a mechanism.
REFUSED: tuple[Family, ...] = (
    Family("bloom", {"n_layer": 2, "n_head": 4}, "ALiBi: positions enter as a bias on the scores"),
    Family(
        "mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "ALiBi: positions enter as a bias on the scores"
    ),
    Family("mamba", {}, "state-space layers"),
    Family("mamba2", {"num_heads": 4, "head_dim": 32, "n_groups": 1}, "state-space layers"),
    Family("rwkv", {"attention_hidden_size": 64}, "recurrent layers"),
    Family(
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            **_MOE,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear attention layers",
    ),
    Family("jamba", {"num_experts": 2}, "state-space layers"),
    Family("recurrent_gemma", {}, "recurrent layers"),
    Family(
        "lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, "convolution over tokens"
    ),
    Family("t5", {"d_model": 64, "num_layers": 2}, "encoder-decoder"),
    Family("bart", {"d_model": 64}, "encoder-decoder"),
    Family("vit", {}, "pictures, not tokens"),
    Family("gemma3", {}, "a vision tower beside the text model"),
    Family("falcon", {"alibi": True}, "attention of its own, not reached by the attention interface"),
    Family(
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "attention of its own, not reached by the attention interface",
    ),
    Family("deberta-v2", {}, "attention of its own"),
    Family("doge", {}, "a mask that the model computes"),
    Family(
        "xglm",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
        "slices a position table by the number of tokens",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """How a captured family compares with eager, as differences relative to the largest logit."""

    family: Family
    captured: CapturedModel
    alone: tuple[float, ...]
    ragged: float


def known(family: Family) -> bool:
    """Whether the installed transformers has this model type, in a form that can be captured."""
    import transformers
    from packaging.version import Version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    new_enough = Version(transformers.__version__) >= Version(family.since)
    return new_enough and family.model_type in CONFIG_MAPPING_NAMES


def compare(family: Family) -> Comparison:
    """Capture a family at its tiny config and compare with the model's own eager attention in fp32.

    Raises:
        UnsupportedModelError: The family cannot be captured.
    """
    source = ModelSource.from_config(family.config())
    captured = capture(source, torch.float32)
    model = eager_model(source)
    weights = model.state_dict().__getitem__
    generator = torch.Generator().manual_seed(1)
    alone = []
    for length in LENGTHS:
        tokens = torch.randint(3, 96, (1, length), generator=generator)
        got = GraphRunner(captured.graph, weights).logits(*inputs(captured, tokens, (length,)))
        alone.append(relative_difference(got, eager_logits(model, tokens)))
    tokens = torch.randint(3, 96, (1, sum(RAGGED)), generator=generator)
    together = GraphRunner(captured.graph, weights, lengths=RAGGED).logits(*inputs(captured, tokens, RAGGED))
    each = torch.cat([eager_logits(model, part) for part in tokens.split(list(RAGGED), dim=1)], dim=1)
    return Comparison(family, captured, tuple(alone), relative_difference(together, each))


def eager_model(source: ModelSource) -> Any:
    """The source's model on the CPU with random fp32 weights and transformers' own eager attention."""
    import copy

    torch.manual_seed(0)
    model = source.model_class._from_config(
        copy.deepcopy(source.config), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@torch.no_grad()
def eager_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Eager output of one sequence [1, T] with the positions that the model itself makes."""
    return model(input_ids=tokens, return_dict=True)[0]


def inputs(
    captured: CapturedModel, tokens: torch.Tensor, lengths: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Graph inputs for sequences laid end to end: ids, positions from 0 in each, token types 0."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    extra = [
        torch.zeros_like(tokens) for node in captured.graph.graph.nodes if node.target == "token_type_ids"
    ]
    return (tokens, positions, *extra)


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude."""
    if got.shape != wanted.shape:
        return float("inf")
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def table() -> str:
    """The support matrix as Markdown. Says what is tested; the tests say that it holds."""
    lines = [
        "# Support matrix",
        "",
        "Each row is a tiny random model of a transformers family. Its captured graph, run in plain torch,",
        "equals the model with its own eager attention in fp32",
        f"at {', '.join(map(str, LENGTHS))} tokens, and for sequences of",
        f"{', '.join(map(str, RAGGED))} tokens laid end to end (`tests/compiler/test_support_matrix.py`).",
        "Written by `python -m qcompiler.capture.matrix docs/support-matrix.md`.",
        "",
        "| family | exercised beyond the plain block |",
        "|---|---|",
        *(f"| {family.name} | {family.shows or '-'} |" for family in SUPPORTED),
        "",
        "## Refused",
        "",
        "Refused by mechanism, not by name: these families show the mechanisms.",
        "",
        "| family | why |",
        "|---|---|",
        *(f"| {family.name} | {family.shows} |" for family in REFUSED),
        "",
        "Rotary types `dynamic` and `longrope`, whose frequencies depend on the length, need `max_context`.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
