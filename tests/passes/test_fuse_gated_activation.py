"""FuseGatedActivation: SwiGLU and GeGLU from two linears or the halves of one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.passes import FuseGatedActivation


class Gated(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.both = nn.Linear(16, 48)

    def forward(self, x):
        return self.rule(self.gate(x), self.up(x), self.both(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "op", "attributes"),
    [
        (lambda g, u, b: F.silu(g) * u, "qcompiler.silu_mul.default", ()),
        (lambda g, u, b: u * F.silu(g), "qcompiler.silu_mul.default", ()),
        (lambda g, u, b: F.gelu(g) * u, "qcompiler.gelu_mul.default", ("none",)),
        (lambda g, u, b: F.gelu(g, approximate="tanh") * u, "qcompiler.gelu_mul.default", ("tanh",)),
        (lambda g, u, b: (h := b.chunk(2, -1))[1] * F.silu(h[0]), "qcompiler.silu_mul.default", ()),
        (lambda g, u, b: F.silu(b[..., 24:]) * b[..., :24], "qcompiler.silu_mul.default", ()),
    ],
)
def test_gate_times_up_becomes_one_op_bit_for_bit(lab, rule, op, attributes, dtype):
    x = torch.randn(2, 5, 16, dtype=dtype)
    gm = lab.export(Gated(rule).to(dtype), x)
    _, difference = lab.check_run(FuseGatedActivation(), gm, x, matched=1)
    assert difference == 0
    assert not set(lab.ops(gm)) & {"aten.silu.default", "aten.gelu.default", "aten.mul.Tensor"}
    (node,) = [n for n in gm.graph.nodes if str(n.target) == op]
    assert node.args[2:] == attributes


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda g, u, b: F.silu(g) * u[:, :, :1], "different shapes"),
        (lambda g, u, b: F.silu(g) * 2.0, "different shapes"),
        (lambda g, u, b: F.silu(g) * u.double(), "gate is torch.float32 and up is torch.float64"),
        (lambda g, u, b: (a := F.silu(g)) * u + a, "read elsewhere"),
    ],
)
def test_near_misses_say_why(lab, rule, reason):
    x = torch.randn(2, 5, 16)
    gm = lab.export(Gated(rule), x)
    result, difference = lab.check_run(FuseGatedActivation(), gm, x, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_an_activation_that_gates_nothing_is_not_a_miss(lab):
    x = torch.randn(2, 5, 16)
    result, _ = lab.check_run(
        FuseGatedActivation(), lab.export(Gated(lambda g, u, b: F.silu(g)), x), x, matched=0
    )
    assert result.skipped == []


def test_x_times_sigmoid_is_left_alone(lab):
    """In bf16 it rounds once more than silu, so it is not the same op."""
    x = torch.randn(2, 5, 16)
    gm = lab.export(Gated(lambda g, u, b: g * torch.sigmoid(g) * u), x)
    lab.check_run(FuseGatedActivation(), gm, x, matched=0)


def test_an_activation_times_itself_keeps_its_value(lab):
    x = torch.randn(2, 5, 16)
    gm = lab.export(Gated(lambda g, u, b: (a := F.silu(g)) * a), x)
    _, difference = lab.check_run(FuseGatedActivation(), gm, x, matched=1)
    assert difference == 0
