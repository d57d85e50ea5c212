"""FuseGatedLinears: gate and up side by side and their activation as one op, for affine weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.passes import (
    FuseGatedActivation,
    FuseGatedLinears,
    FuseSiblingLinears,
    QuantizeLinears,
    graph_text,
)

X = torch.randn(1, 5, 64)
SPEC = AffineSpec(4, 32)


class Gated(nn.Module):
    """Two linears and one that is both."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.gate, self.up = nn.Linear(64, 48), nn.Linear(64, 48)
        self.both = nn.Linear(64, 96, bias=False)

    def forward(self, x):
        return self.rule(self, x)


def rounded(name, weight, spec):
    grouped = weight.unflatten(1, (-1, spec.group_size))
    scales = (grouped.amax(-1) - grouped.amin(-1)) / 15
    zeros = -grouped.amin(-1) / scales
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return AFFINE.pack(spec, codes.flatten(1).to(torch.uint8), scales, zeros)


def prepared(lab, rule, *, quantize=True):
    gm = lab.export(Gated(rule), X)
    passes = [FuseGatedActivation(), *([QuantizeLinears(lambda *_: SPEC, rounded)] if quantize else [])]
    for item in (*passes, FuseSiblingLinears()):
        item.run(gm)
    return gm


@pytest.mark.parametrize(
    ("rule", "activation"),
    [
        (lambda m, x: F.silu(m.gate(x)) * m.up(x), "silu"),
        (lambda m, x: F.gelu(m.gate(x)) * m.up(x), "gelu"),
        (lambda m, x: F.gelu(m.gate(x), approximate="tanh") * m.up(x), "gelu_tanh"),
        (lambda m, x: (h := m.both(x).chunk(2, -1))[1] * F.silu(h[0]), "silu"),
        (lambda m, x: F.silu((h := m.both(x))[..., :48]) * h[..., 48:], "silu"),
    ],
)
def test_the_activation_goes_into_the_linear_bit_for_bit(lab, rule, activation):
    gm = prepared(lab, rule)
    result, difference = lab.check_run(FuseGatedLinears(), gm, X, matched=1)
    assert difference == 0
    assert lab.ops(gm) == {"qcompiler.linear_affine_gated.default": 1}
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert node.args[-1] == activation
    assert (result.launches_saved, result.bytes_saved) == (1, 2 * 96 * 4)
    assert "# saves 1 launches and 768 bytes of activations a token" in graph_text(gm, result)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda m, x: F.silu(m.gate(x)) * x[..., :48], "not parts of one linear"),
        (lambda m, x: F.silu((h := m.both(x))[..., 48:]) * h[..., :48], "not the first and the second half"),
        (lambda m, x: F.silu((h := m.both(x))[..., :48]) * h[..., 48:] + h[..., :48], "read elsewhere too"),
        (lambda m, x: (F.silu((h := m.both(x))[..., :48]) * h[..., 48:]).sum() + h, "read elsewhere too"),
    ],
)
def test_near_misses_say_why(lab, rule, reason):
    gm = prepared(lab, rule)
    result, difference = lab.check_run(FuseGatedLinears(), gm, X, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_other_formats_keep_their_activation(lab):
    gm = prepared(lab, lambda m, x: F.silu(m.gate(x)) * m.up(x), quantize=False)
    result, _ = lab.check_run(FuseGatedLinears(), gm, X, matched=0)
    assert ["no op with an activation" in skip.reason for skip in result.skipped] == [True]
