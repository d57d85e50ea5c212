"""Functionalize: writes that nobody can see from outside become values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import Functionalize


class Rule(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.register_buffer("state", torch.ones(4, 6))

    def forward(self, x):
        return self.rule(x, self.state)


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (lambda x, _: (x + 1).mul_(2), "aten.mul_.Tensor"),
        (lambda x, _: (y := x.exp()).div_(y.sum(-1, keepdim=True)), "aten.div_.Tensor"),
        (lambda x, _: torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1.0), "aten.scatter_.value"),
    ],
)
def test_a_write_to_a_fresh_tensor_becomes_a_value(lab, rule, gone):
    x = torch.randn(4, 6)
    gm = lab.export(Rule(rule), x)
    assert lab.ops(gm)[gone] == 1
    _, difference = lab.check_run(Functionalize(), gm, x, matched=1)
    assert difference == 0
    assert not any(n.target._schema.is_mutable for n in gm.graph.nodes if n.op == "call_function")


def test_a_buffer_filled_part_by_part_becomes_a_concatenation(lab):
    def rule(x, _):
        out = x.new_empty(4, 9)
        out[:, 6:] = x[:, :3]
        out[:, :6] = x * 2
        return out + 1

    x = torch.randn(4, 6)
    gm = lab.export(Rule(rule), x)
    _, difference = lab.check_run(Functionalize(), gm, x, matched=1)
    assert difference == 0
    assert lab.ops(gm)["aten.cat.default"] == 1
    assert lab.ops(gm)["aten.copy_.default"] == 0


def test_a_buffer_with_a_gap_stays(lab):
    def rule(x, _):
        out = x.new_zeros(4, 9)
        out[:, :3] = x[:, :3]
        return out

    x = torch.randn(4, 6)
    gm = lab.export(Rule(rule), x)
    result, difference = lab.check_run(Functionalize(), gm, x, matched=0)
    assert difference == 0
    assert ["through a view" in skip.reason for skip in result.skipped] == [True]


def seen_by_a_view(x, _):
    y = x + 1
    first = y[0]
    y.mul_(2)
    return first


def test_writes_that_a_view_sees_stay_with_the_reason(lab):
    x = torch.randn(4, 6)
    gm = lab.export(Rule(seen_by_a_view), x)
    result, difference = lab.check_run(Functionalize(), gm, x, matched=0)
    assert difference == 0
    assert ["a view of the tensor" in skip.reason for skip in result.skipped] == [True]


def test_a_tensor_read_by_its_old_name_after_the_write_stays(lab):
    x = torch.randn(4, 6)
    gm = lab.export(Rule(lambda x, _: (x + 1).mul_(2) * 3), x)
    fresh, write, product = (n for n in gm.graph.nodes if n.op == "call_function")
    product.args = (fresh, write)
    gm.recompile()
    result, difference = lab.check_run(Functionalize(), gm, x, matched=0)
    assert difference == 0
    assert ["read again after" in skip.reason for skip in result.skipped] == [True]


def test_a_write_to_one_of_several_results(lab):
    def rule(x, _):
        values = x.topk(2).values
        values /= values.sum(-1, keepdim=True)
        return values

    x = torch.randn(4, 6)
    gm = lab.export(Rule(rule), x)
    _, difference = lab.check_run(Functionalize(), gm, x, matched=1)
    assert difference == 0


def test_writes_to_inputs_stay(lab):
    x = torch.randn(4, 6)
    gm = lab.export(Rule(lambda x, _: x.add_(1) * 2), x)
    result = Functionalize().run(gm)
    assert result.matched == 0
    assert any("input or a weight" in skip.reason for skip in result.skipped)
