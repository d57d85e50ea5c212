"""QuantizeLinears on real weights and on meta, with reasons for every linear left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.errors import InvalidInputError, PassError
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes import Loaded, PassManager, Quantized, QuantizeLinears, resolve, weight_recipes

AFFINE = "qcompiler.linear_affine.default"
SPEC = AffineSpec(8, 32)


def round_to_nearest(name, weight, spec):
    """Plain min-max quantization, packed."""
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, spec.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**spec.bits - 1)).clamp(min=1e-6)
    zeros = -low / scales
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**spec.bits - 1)
    return get_format("affine").pack(spec, codes.view(rows, columns).to(torch.uint8), scales, zeros)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()))


IDS = torch.arange(12).view(1, 12)


def test_real_weights_are_quantized_at_once(lab):
    gm = lab.export(Net(), IDS, dynamic=1)
    result, difference = lab.check_run(QuantizeLinears(lambda *_: SPEC, round_to_nearest), gm, IDS, matched=3)
    assert lab.ops(gm)[AFFINE] == 3
    assert "aten.linear.default" not in lab.ops(gm)
    assert 0 < difference < 0.02  # eight bits
    assert [(q.name, q.out_features, q.in_features, q.bias) for q in result.quantized] == [
        ("up", 128, 64, "up.bias"),
        ("down", 64, 128, None),
        ("head", 96, 64, None),
    ]


def test_outputs_equal_those_of_the_dequantized_weights(lab):
    gm = lab.export(Net(), IDS)
    plain = Net()
    plain.load_state_dict({k: v for k, v in gm.state_dict().items() if k in plain.state_dict()}, strict=False)
    made = {}

    def quantize(name, weight, spec):
        made[name] = round_to_nearest(name, weight, spec)
        return made[name]

    QuantizeLinears(lambda *_: SPEC, quantize).run(gm)
    dense = {
        name: get_format("affine").dequantize(SPEC, parts, 128 if name == "down" else 64, torch.float32)
        for name, parts in made.items()
    }
    x = gm.embed.weight[IDS] if hasattr(gm, "embed") else gm.head.weight[IDS]
    hidden = nn.functional.linear(x, dense["up"], gm.up.bias).relu()
    wanted = nn.functional.linear(nn.functional.linear(hidden, dense["down"]), dense["head"])
    assert lab.difference(gm(IDS), wanted) < 1e-5


def test_a_tied_embedding_keeps_its_raw_tensor(lab):
    gm = lab.export(Net(), IDS)
    QuantizeLinears(lambda name, *_: SPEC if name == "head" else "kept", round_to_nearest).run(gm)
    tensors = dict((*gm.named_parameters(), *gm.named_buffers()))
    (table,) = [n for n in gm.graph.nodes if str(n.target) == "aten.embedding.default"]
    assert tensors[table.args[0].target].shape == (96, 64)
    assert {"head.low", "head.scales", "head.zeros"} <= set(tensors)


def test_dead_float_weights_are_dropped(lab):
    gm = lab.export(Net(), IDS)
    QuantizeLinears(lambda *_: SPEC, round_to_nearest).run(gm)
    names = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    assert not {"up.weight", "down.weight"} & names
    assert "up.bias" in names


def test_reasons_for_what_is_left_alone(lab):
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, ids):
            x = super().forward(ids)[0, :, :64]
            x = torch.ops.qcompiler.grouped_linear(
                x, self.experts, torch.tensor([4, 12], dtype=torch.int32), None
            )
            return nn.functional.linear(x, self.down.weight.t() + 1)

    gm = lab.export(Odd(), IDS)
    result = QuantizeLinears(
        lambda name, *_: SPEC if name == "up" else "chosen by --skip", round_to_nearest
    ).run(gm)
    reasons = dict(result.skipped)
    assert result.matched == 1
    assert reasons["down"] == reasons["head"] == "chosen by --skip"
    assert reasons["experts"] == "chosen by --skip"
    assert any("computed" in reason for reason in reasons.values())


def test_on_meta_only_shapes_and_recipes_are_made(lab):
    model = lab.family("qwen2")
    wanted = model.model.state_dict()
    spec = AffineSpec(4, 32)
    result = QuantizeLinears(lambda *_: spec).run(model.graph)
    assert result.matched == 15
    recipe = weight_recipes(model.graph)["model.layers.1.mlp.up_proj.low"]
    name = "model.layers.1.mlp.up_proj"
    assert recipe == Quantized(Loaded(f"{name}.weight"), "affine", spec, "low", name)
    assert all(t.is_meta for t in (model.graph.get_buffer(f"{name}.{p}") for p in ("low", "scales", "zeros")))
    # qwen2 is tied: the head is quantized under its own name, from the embedding's weight
    head = next(q for q in result.quantized if q.name == "lm_head")
    assert head.weight == weight_recipes(model.graph)["lm_head.low"].source.source
    assert wanted[head.weight].shape == (96, 64)
    made = resolve(
        recipe,
        wanted.__getitem__,
        lambda r: round_to_nearest(r.name, resolve(r.source, wanted.__getitem__), r.spec),
    )
    assert made.shape == model.graph.get_buffer(f"{name}.low").shape


def test_a_wrong_tensor_from_the_quantizer_is_refused(lab):
    gm = lab.export(Net(), IDS)
    with pytest.raises(InvalidInputError, match=r"up: .*'scales'"):
        QuantizeLinears(
            lambda *_: SPEC, lambda n, w, s: {**round_to_nearest(n, w, s), "scales": torch.ones(1)}
        ).run(gm)


def test_nothing_to_quantize_is_an_error_with_the_reasons(lab):
    gm = lab.export(Net(), IDS)
    with pytest.raises(PassError, match=r"quantize_linears: matched nothing.*too small"):
        PassManager([QuantizeLinears(lambda *_: "too small")]).run(gm)
