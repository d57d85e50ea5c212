"""QuantizeLinears on expert weights: real and on meta, both layouts, one expert at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes import ExpertRows, Loaded, Quantized, QuantizeLinears, resolve, weight_recipes

GROUPED, AFFINE = "qcompiler.grouped_linear.default", "qcompiler.grouped_linear_affine.default"
SPEC = AffineSpec(8, 32)
EXPERTS = 3


def round_to_nearest(name, weight, spec):
    """Plain min-max quantization, packed."""
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, -1, spec.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**spec.bits - 1)).clamp(min=1e-6)
    zeros = -low / scales
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**spec.bits - 1)
    return get_format("affine").pack(spec, codes.view(rows, columns).to(torch.uint8), scales, zeros)


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        torch.manual_seed(0)
        self.transposed = transposed
        up, down = torch.randn(EXPERTS, 96, 64), torch.randn(EXPERTS, 64, 96)
        self.up = nn.Parameter(up.transpose(1, 2).contiguous() if transposed else up)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 96))
        self.down = nn.Parameter(down.transpose(1, 2).contiguous() if transposed else down)
        self.register_buffer("ends", torch.tensor([5, 5, 9], dtype=torch.int32))

    def forward(self, x):
        op = torch.ops.qcompiler.grouped_linear
        x = op(x, self.up, self.ends, self.up_bias, self.transposed).relu()
        return op(x, self.down, self.ends, None, self.transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_quantized_one_by_one_in_either_layout(lab, transposed):
    x = torch.randn(10, 64)
    gm = lab.export(Experts(transposed), x, dynamic=0)
    asked = []

    def quantize(name, weight, spec):
        asked.append((name, tuple(weight.shape)))
        return round_to_nearest(name, weight, spec)

    result, difference = lab.check_run(QuantizeLinears(lambda *_: SPEC, quantize), gm, x, matched=2)
    assert 0 < difference < 0.02  # eight bits
    assert lab.ops(gm)[AFFINE] == 2
    assert GROUPED not in lab.ops(gm)
    assert asked == [("up", (96, 64))] * EXPERTS + [("down", (64, 96))] * EXPERTS
    found = [(q.name, q.kind, q.experts, q.out_features, q.in_features, q.bias) for q in result.quantized]
    assert found == [
        ("up", "experts", EXPERTS, EXPERTS * 96, 64, "up_bias"),
        ("down", "experts", EXPERTS, EXPERTS * 64, 96, None),
    ]


def test_the_float_weight_makes_room_for_the_stored_tensors(lab):
    gm = lab.export(Experts(transposed=False), torch.randn(10, 64))
    QuantizeLinears(lambda *_: SPEC, round_to_nearest).run(gm)
    names = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    assert {"up.low", "up.scales", "up.zeros", "up_bias"} <= names
    assert not {"up", "down"} & names


def test_a_recipe_gives_the_rows_of_all_experts_whatever_the_layout(lab):
    model = Experts(transposed=True)
    gm = lab.export(model, torch.randn(10, 64))
    for name, parameter in list(gm.named_parameters()):
        gm._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"))
    QuantizeLinears(lambda *_: SPEC).run(gm)
    recipe = weight_recipes(gm)["up.low"]
    assert recipe == Quantized(ExpertRows(Loaded("up"), True), "affine", SPEC, "low", "up")
    assert "up" not in weight_recipes(gm)
    rows = resolve(recipe.source, model.state_dict().__getitem__)
    assert torch.equal(rows, model.up.transpose(1, 2).reshape(-1, 64))
    assert gm.get_buffer("up.low").shape[0] == rows.shape[0]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_real_families_on_meta(lab, name):
    model = lab.family(name)
    result = QuantizeLinears(lambda name, *_: AffineSpec(4, 16) if "experts" in name else "not today").run(
        model.graph
    )
    assert result.matched == 4
    assert {q.name for q in result.quantized} == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in (0, 1)
        for part in ("gate_up_proj", "down_proj")
    }
    for q in result.quantized:
        held = model.weights[q.weight]
        assert (q.experts, q.out_features, q.in_features) == (
            held.shape[0],
            held.shape[0] * held.shape[2 if q.transposed else 1],
            held.shape[1 if q.transposed else 2],
        )


def test_experts_in_a_batched_product_are_named(lab):
    result = QuantizeLinears(lambda *_: AffineSpec(4, 16)).run(lab.family("llama4_text").graph)
    skipped = {name: reason for name, reason in result.skipped if "experts" in name}
    experts = "model.layers.1.feed_forward.experts"  # its first layer is dense
    assert set(skipped) == {f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    assert all("batched product" in reason for reason in skipped.values())


def test_reasons_for_experts_left_alone(lab):
    class Odd(Experts):
        def __init__(self, transposed):
            super().__init__(transposed)
            self.third = nn.Parameter(torch.randn(EXPERTS, 96, 64))

        def forward(self, x):
            x = super().forward(x) + self.down.sum()
            return torch.ops.qcompiler.grouped_linear(x, self.third * 2, self.ends, None, False)

    gm = lab.export(Odd(transposed=False), torch.randn(10, 64))
    result = QuantizeLinears(
        lambda name, *_: "chosen by --skip" if name == "up" else SPEC, round_to_nearest
    ).run(gm)
    assert result.matched == 0
    reasons = dict(result.skipped)
    assert reasons["up"] == "chosen by --skip"
    assert reasons["down"] == "its weights are read in another way too"
    assert "its weight is computed, not a parameter" in reasons.values()
