"""FuseSiblingLinears: Q/K/V and gate/up as one product, float and quantized."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes import (
    Concat,
    FuseSiblingLinears,
    Loaded,
    Quantized,
    QuantizeLinears,
    Zeros,
    resolve,
    weight_recipes,
)

AFFINE = "qcompiler.linear_affine.default"
LINEAR = "aten.linear.default"


class Attention(nn.Module):
    """Three projections of one input; k alone has no bias."""

    def __init__(self, widths=(64, 32, 32), biases=(True, False, True)):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(64, width, bias=bias) for width, bias in zip(widths, biases, strict=True)
        )

    def forward(self, x):
        q = self.q_proj(x).view(1, -1, 4, 16).transpose(1, 2)
        return torch.cat(
            [q.transpose(1, 2).flatten(2), self.k_proj(x), self.v_proj(x).view(1, -1, 32)], dim=-1
        )


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.self_attn = Attention(**options)

    def forward(self, x):
        return self.self_attn(x)


X = torch.randn(1, 7, 64)
ROUNDING = 1e-6  # one wide product may add in another order than three narrow ones


def test_three_linears_become_one_and_slices(lab):
    gm = lab.export(Block(), X, dynamic=1)
    weights = {name: tensor.detach().clone() for name, tensor in gm.named_parameters()}
    _, difference = lab.check_run(FuseSiblingLinears(), gm, X, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm)[LINEAR] == 1
    assert lab.ops(gm)["aten.slice.Tensor"] == 3
    name = "self_attn.q_proj_and_k_proj_and_v_proj"
    assert sorted(k for k, _ in (*gm.named_parameters(), *gm.named_buffers())) == [
        f"{name}.bias",
        f"{name}.weight",
    ]
    recipes = weight_recipes(gm)
    assert recipes[f"{name}.weight"] == Concat(tuple(Loaded(f"self_attn.{p}_proj.weight") for p in "qkv"), 0)
    assert recipes[f"{name}.bias"].parts[1] == Zeros((32,), torch.float32)
    for fqn, recipe in recipes.items():
        assert torch.equal(resolve(recipe, weights.__getitem__), gm.get_buffer(fqn))


def test_without_biases_none_is_made(lab):
    gm = lab.export(Block(biases=(False,) * 3), X)
    lab.check_run(FuseSiblingLinears(), gm, X, matched=1)
    assert len(list(gm.buffers())) == 1


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantized_siblings_give_the_same_numbers(lab, bits):
    spec = AffineSpec(bits, 32)
    quantize = _quantizer()
    gm = lab.export(Block(), X, dynamic=1)
    QuantizeLinears(lambda *_: spec, quantize).run(gm)
    _, difference = lab.check_run(FuseSiblingLinears(), gm, X, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm)[AFFINE] == 1
    name = "self_attn.q_proj_and_k_proj_and_v_proj"
    recipe = weight_recipes(gm)[f"{name}.scales"]
    assert isinstance(recipe, Concat)
    assert recipe.dim == 1  # scales lie [groups, out_features]
    assert [part.name for part in recipe.parts if isinstance(part, Quantized)] == [
        f"self_attn.{p}_proj" for p in "qkv"
    ]
    assert gm.get_buffer(f"{name}.scales").shape == (2, 128)
    shapes = get_format("affine").tensor_specs(spec, 128, 64)
    assert {k: tuple(gm.get_buffer(f"{name}.{k}").shape) for k in shapes} == {
        k: s.shape for k, s in shapes.items()
    }


def test_different_formats_stay_apart_with_the_reason(lab):
    specs = {"q_proj": AffineSpec(4, 32), "k_proj": AffineSpec(8, 32), "v_proj": AffineSpec(4, 64)}
    gm = lab.export(Block(), X)
    QuantizeLinears(lambda name, *_: specs[name.rsplit(".", 1)[1]], _quantizer()).run(gm)
    result, _ = lab.check_run(FuseSiblingLinears(), gm, X, matched=0)
    assert ["another format" in skip.reason for skip in result.skipped] == [True] * 3


def test_equal_formats_among_different_ones_are_merged(lab):
    gm = lab.export(Block(), X)
    spec = AffineSpec(4, 32)
    QuantizeLinears(lambda name, *_: "kept" if "k_proj" in name else spec, _quantizer()).run(gm)
    _, difference = lab.check_run(FuseSiblingLinears(), gm, X, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm)[AFFINE] == lab.ops(gm)[LINEAR] == 1


def test_a_weight_shared_with_someone_else_is_not_merged(lab):
    class Tied(Block):
        def forward(self, x):
            return self.self_attn(x) + self.self_attn.k_proj.weight.sum()

    gm = lab.export(Tied(), X)
    result, difference = lab.check_run(FuseSiblingLinears(), gm, X, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm)[LINEAR] == 2
    assert ["read elsewhere" in skip.reason for skip in result.skipped] == [True]


def test_linears_of_different_inputs_are_no_siblings(lab):
    gm = lab.export(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), X)
    result, _ = lab.check_run(FuseSiblingLinears(), gm, X, matched=0)
    assert result.skipped == []


def test_the_order_is_that_of_the_graph(lab):
    names = []
    for _ in range(2):
        model = lab.family("llama")
        FuseSiblingLinears().run(model.graph)
        names.append([n for n, _ in model.graph.named_buffers() if "_and_" in n])
    assert names[0] == names[1]
    assert "model.layers.0.mlp.gate_proj_and_up_proj.weight" in names[0]


def _quantizer():
    spec = importlib.util.spec_from_file_location(
        "rtn", __file__.replace("fuse_sibling_linears", "quantize_linears")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.round_to_nearest
