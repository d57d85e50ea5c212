"""Recipes: how tensors of a rewritten graph come from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.passes import Concat, Loaded, Quantized, Zeros, resolve, sources
from qcompiler.passes.weights import layer_name

CHECKPOINT = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, 3)}


def test_a_tensor_is_loaded_and_transposed():
    assert resolve(Loaded("a"), CHECKPOINT.__getitem__) is CHECKPOINT["a"]
    turned = resolve(Loaded("a", transposed=True), CHECKPOINT.__getitem__)
    assert torch.equal(turned, CHECKPOINT["a"].T)
    assert turned.is_contiguous()


def test_parts_are_laid_side_by_side():
    recipe = Concat((Loaded("a"), Zeros((1, 3), torch.float32), Loaded("b")), 0)
    made = resolve(recipe, CHECKPOINT.__getitem__)
    assert torch.equal(made, torch.cat([CHECKPOINT["a"], torch.zeros(1, 3), torch.ones(1, 3)]))
    assert sources(recipe) == ["a", "b"]


def test_a_quantized_part_asks_the_quantizer():
    asked = []

    def quantize(recipe):
        asked.append(recipe.name)
        weight = resolve(recipe.source, CHECKPOINT.__getitem__)
        return {"low": weight.int(), "scales": weight.sum(1)}

    low = Quantized(Loaded("a"), "affine", None, "low", "layer")
    scales = Quantized(Loaded("b"), "affine", None, "scales", "other")
    assert torch.equal(resolve(low, CHECKPOINT.__getitem__, quantize), CHECKPOINT["a"].int())
    assert torch.equal(resolve(Concat((scales,)), CHECKPOINT.__getitem__, quantize), torch.tensor([3.0]))
    assert asked == ["layer", "other"]
    assert sources(Concat((low, scales))) == ["a", "b"]


@pytest.mark.parametrize(("quantize", "what"), [(None, "no quantizer"), (lambda r: {"low": 1}, "no 'zeros'")])
def test_a_part_that_cannot_be_made_is_named(quantize, what):
    with pytest.raises(InvalidInputError, match=what) as error:
        resolve(Quantized(Loaded("a"), "affine", None, "zeros", "layer"), CHECKPOINT.__getitem__, quantize)
    assert "layer" in error.value.message


@pytest.mark.parametrize(
    ("fqn", "layer"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"),
        ("h.0.attn.c_attn.weight_t", "h.0.attn.c_attn"),
        ("experts.gate_up_proj", "experts.gate_up_proj"),
        ("weight", "weight"),
    ],
)
def test_layers_are_named_by_their_weight(fqn, layer):
    assert layer_name(fqn) == layer
