"""The support matrix: captured graphs equal the models' own eager attention; the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompiler.capture import ModelSource, capture
from qcompiler.capture.matrix import REFUSED, SUPPORTED, Family, compare, known, table
from qcompiler.kernels.errors import UnsupportedModelError

# fp32, two layers: rounding of sums in another order, relative to the largest logit
TOLERANCE = 1e-5
TABLE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
# A part of the message for each refused family; transformers releases differ in which mechanism is met first.
REASONS = {
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "mamba": "linear_attention|convolution|position_ids",
    "mamba2": "linear_attention|convolution|position_ids",
    "rwkv": "recurrent",
    "qwen3_next": "linear_attention",
    "jamba": "linear_attention|convolution|mamba",
    "recurrent_gemma": "linear_attention|convolution|recurrent",
    "lfm2": "conv",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "vit": "pixel_values",
    "gemma3": "vision_config",
    "falcon": "table of its own",
    "gptj": "table of its own",
    "deberta-v2": "its own attention",
    "doge": "mask that the model computed",
    "xglm": "guard|tokens",
}


def _skip_unknown(family: Family) -> None:
    if not known(family):
        pytest.skip(f"this transformers has no {family.model_type}")


@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)
def test_captured_family_equals_eager(family: Family) -> None:
    _skip_unknown(family)
    result = compare(family)
    assert max(result.alone) < TOLERANCE, f"one sequence at a time: {result.alone}"
    assert result.ragged < TOLERANCE, "sequences laid end to end influence each other"
    targets = {str(n.target) for n in result.captured.graph.graph.nodes if n.op == "call_function"}
    foreign = {t for t in targets if not t.startswith(("aten.", "qcompiler.", "<built-in function"))}
    assert not foreign, "ops that the runtime does not know"
    in_place = {t for t in targets if t.startswith("aten.") and t.split(".")[1].endswith("_")}
    assert not in_place


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_refused_family_names_itself_and_the_reason(family: Family) -> None:
    _skip_unknown(family)
    with pytest.raises(UnsupportedModelError, match=REASONS[family.model_type]) as refusal:
        capture(ModelSource.from_config(family.config()))
    assert family.model_type in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_matrix_covers_the_promised_families() -> None:
    promised = [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "gpt2",
        "opt",
        "gpt_neox",
        "mixtral",
        "qwen3_moe",
        "olmo2",
        "olmoe",
        "granite",
        "cohere",
        "stablelm",
        "starcoder2",
        "smollm3",
        "gpt_oss",
        "deepseek_v3",
        "glm4",
        "llama4_text",
        "nemotron",
        "bert",
    ]
    assert set(promised) <= {family.model_type for family in SUPPORTED}
    assert {"bloom", "mpt", "mamba", "qwen3_next"} <= {family.model_type for family in REFUSED}


def test_table_in_the_docs_is_current() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(), (
        "run: python -m qcompiler.capture.matrix docs/support-matrix.md"
    )
