"""Outlier features that do not change a model's function: LLM.int8() keeps its quality, plain W8A8 loses it.

1 % of each norm's channels is scaled by 30 and the columns of the linears behind it are divided by 30.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.formats import INT8_CHANNEL, Int8ChannelSpec
from qcompiler.methods.base import get_method

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    path = _ROOT / "examples" / "models" / "tiny-llama"
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(_ROOT / "examples" / "models" / "tiny-llama" / "tokenizer.json")
    )
    text = (_ROOT / "qcompiler" / "data" / "eval.txt").read_text(encoding="utf-8")[:4000]
    return torch.tensor(tokenizer.encode(text).ids[:512])[None]


@torch.no_grad()
def with_outliers(model: torch.nn.Module, fraction: float = 0.01, factor: float = 30.0) -> torch.nn.Module:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            count = max(1, round(norm.weight.numel() * fraction))
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:count]
            norm.weight[channels] *= factor
            for linear in linears:
                linear.weight[:, channels] /= factor
    return model


class Int8Linear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, spec: Int8ChannelSpec):
        super().__init__()
        self.spec, self.in_features, self.bias = spec, linear.in_features, linear.bias
        self.tensors = get_method("bnb").quantize(linear.weight.detach(), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        op, arguments = INT8_CHANNEL.op_call(self.spec, x, self.tensors, self.bias, self.in_features)
        return op(*arguments)


@torch.no_grad()
def kl_of(
    model: torch.nn.Module, threshold: float | None, tokens: torch.Tensor, original: torch.Tensor
) -> float:
    """Mean KL(original ‖ quantized) in nats; threshold None: weights alone, 0: all activations too."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(block, name, Int8Linear(child, Int8ChannelSpec(threshold)))
    quantized = model(tokens).logits.log_softmax(-1)
    return float((original.exp() * (original - quantized)).sum(-1).mean())


def test_outlier_features_spare_llm_int8_and_spoil_plain_w8a8(model, tokens):
    changed = with_outliers(model)
    with torch.no_grad():
        before, after = model(tokens).logits, changed(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)  # the same function

    original = before.log_softmax(-1)
    ordinary = kl_of(model, 0.0, tokens, original)
    plain = kl_of(changed, 0.0, tokens, original)
    mixed = kl_of(changed, 6.0, tokens, original)
    weights_only = kl_of(changed, None, tokens, original)
    print(
        f"KL: plain W8A8 {ordinary:.4f} before, {plain:.4f} with outliers; "
        f"LLM.int8() {mixed:.4f}; weights alone {weights_only:.4f}"
    )
    assert plain > 10 * ordinary
    assert mixed < plain / 5
    # What is left is the weights' own rounding: their divided columns are small beside the row's absmax.
    assert mixed < 1.5 * weights_only
