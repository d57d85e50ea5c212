"""Options are refused before any work; patterns choose bits per linear."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.layer_plan import LayerPlan, matches
from qcompiler.options import CompileOptions, parse_bits


def test_bits_values_split_into_default_and_overrides():
    assert parse_bits(("4", "*.o_proj=8", "model.layers.0.*=6")) == (
        4,
        (("*.o_proj", 8), ("model.layers.0.*", 6)),
    )
    assert parse_bits(()) == (None, ())


def test_an_embedding_takes_its_bits_from_patterns_and_a_tied_head_follows():
    options = CompileOptions(
        "model", embedding_bits=4, lm_head_bits=8, bits_overrides=(("embed_tokens", 8),), skip=("wte",)
    )
    plan = LayerPlan(options)
    assert plan.embedding_bits_for("transformer.wte") == "--skip wte"
    assert plan.embedding_bits_for("model.embed_tokens") == 8
    assert plan.shares_embedding("lm_head") is None
    plan.check_all_used([])
    assert plan.embedding_bits_for("other") == 4
    with pytest.raises(InvalidInputError, match="cannot have 8 bits and the embedding 4"):
        plan.shares_embedding("lm_head")


@pytest.mark.parametrize("values", [("four",), ("o_proj=",), ("3", "4"), ("=x",)])
def test_bits_values_that_make_no_sense_are_refused(values):
    with pytest.raises(InvalidInputError, match="--bits"):
        parse_bits(values)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"max_kl": -0.1}, "max_kl"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"max_kl": 0.1, "eval_tokens": 0}, "switched off"),
        ({"eval_tokens": -1}, "eval_tokens"),
        ({"eval_context": 1}, "eval_context"),
        ({"eval_text": Path("no/such/file.txt")}, "does not exist"),
        ({"resume": True, "overwrite": True}, "contradict"),
    ],
)
def test_impossible_options_are_refused(change, told):
    with pytest.raises(InvalidInputError, match=told):
        CompileOptions(model="m", **change)


def test_the_output_is_named_after_model_method_and_bits():
    assert CompileOptions(model="models/tiny-llama/", bits=3).output_path == Path("tiny-llama-hqq-3bit")
    assert CompileOptions(model="meta/Llama-3-8B", method="rtn").output_path == Path("Llama-3-8B-rtn-4bit")


def test_a_pattern_means_the_whole_name_or_its_tail():
    assert matches("o_proj", "model.layers.3.self_attn.o_proj")
    assert matches("model.layers.3.*", "model.layers.3.self_attn.o_proj")
    assert not matches("proj", "model.layers.3.self_attn.o_proj")


def plan(**options) -> LayerPlan:
    return LayerPlan(CompileOptions(model="m", **options), head_names=frozenset({"lm_head"}))


def test_the_last_matching_override_wins_and_skip_beats_all():
    chosen = plan(bits=3, bits_overrides=(("*proj", 4), ("o_proj", 8)), skip=("model.layers.0.*",))
    assert chosen.bits_for("model.layers.1.mlp.fc") == 3
    assert chosen.bits_for("model.layers.1.q_proj") == 4
    assert chosen.bits_for("model.layers.1.o_proj") == 8
    assert chosen.bits_for("model.layers.0.o_proj") == "--skip model.layers.0.*"


def test_head_and_routers_are_left_alone_unless_named():
    assert "output head" in str(plan().bits_for("lm_head"))
    assert plan(lm_head_bits=8).bits_for("lm_head") == 8
    assert plan(bits_overrides=(("lm_head", 6),)).bits_for("lm_head") == 6
    assert plan().bits_for("model.layers.0.mlp.gate") == "expert router"
    assert plan().bits_for("model.layers.0.mlp.gate_proj") == 4


def test_a_pattern_that_matches_nothing_is_a_typo_not_a_wish():
    chosen = plan(skip=("o_porj",))
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    for name in names:
        chosen.bits_for(name)
    with pytest.raises(InvalidInputError, match="o_porj") as caught:
        chosen.check_all_used(names)
    assert "o_proj" in (caught.value.hint or "")
