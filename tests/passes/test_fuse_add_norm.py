"""FuseAddNorm: residual addition and the norm behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import FuseAddNorm, FuseRMSNorm

ADD_NORM = "qcompiler.add_rms_norm.default"


class Residual(nn.Module):
    def __init__(self, rule, dtype):
        super().__init__()
        self.rule = rule
        self.norm, self.second = nn.RMSNorm(16, eps=1e-6, dtype=dtype), nn.RMSNorm(16, eps=1e-6, dtype=dtype)

    def forward(self, x, r):
        return self.rule(self, x, r)


def weighted(x, weight):
    return nn.functional.rms_norm(x, (16,), weight, 1e-6)


def graph(lab, rule, dtype=torch.float32):
    inputs = torch.randn(1, 5, 16, dtype=dtype), torch.randn(1, 5, 16, dtype=dtype)
    gm = lab.export(Residual(rule, dtype), *inputs, dynamic=1)
    FuseRMSNorm().run(gm)
    return gm, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm_become_one_op_bit_for_bit(lab, dtype):
    gm, inputs = graph(lab, lambda m, x, r: (s := x + r) * 2 + m.norm(s), dtype)
    _, difference = lab.check_run(FuseAddNorm(), gm, *inputs, matched=1)
    assert difference == 0
    assert lab.ops(gm)[ADD_NORM] == 1
    assert lab.ops(gm)["qcompiler.rms_norm.default"] == 0


def test_a_stack_of_layers_shares_the_running_sum(lab):
    def rule(m, x, r):
        s = x + r
        s = s + m.norm(s)
        return s + m.second(s)

    gm, inputs = graph(lab, rule)
    _, difference = lab.check_run(FuseAddNorm(), gm, *inputs, matched=2)
    assert difference == 0
    assert lab.ops(gm) == {ADD_NORM: 2, "<built-in function getitem>": 4, "aten.add.Tensor": 1}


def test_of_two_norms_of_one_sum_the_first_takes_it(lab):
    gm, inputs = graph(lab, lambda m, x, r: m.norm(s := x + r) + m.second(s))
    _, difference = lab.check_run(FuseAddNorm(), gm, *inputs, matched=1)
    assert difference == 0
    assert lab.ops(gm)["qcompiler.rms_norm.default"] == 1


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda m, x, r: m.norm(torch.add(x, r, alpha=2)), "scales its second term"),
        (lambda m, x, r: m.norm(x + r[:, :, :1]), "different shapes"),
        (lambda m, x, r: m.norm(x + 1.0), "different shapes"),
        (
            lambda m, x, r: (s := x + r) * 2 + weighted(s, r[0, 0].tanh()),
            "before the norm's weight is computed",
        ),
    ],
)
def test_near_misses_say_why(lab, rule, reason):
    gm, inputs = graph(lab, rule)
    result, difference = lab.check_run(FuseAddNorm(), gm, *inputs, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_a_norm_of_no_sum_is_not_a_miss(lab):
    gm, inputs = graph(lab, lambda m, x, r: m.norm(x) + r)
    result, _ = lab.check_run(FuseAddNorm(), gm, *inputs, matched=0)
    assert result.skipped == []
