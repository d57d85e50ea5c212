"""InlineSubgraphs, RemoveAsserts, RemoveNoOps and MergeCommonSubexpressions on raw exports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import InlineSubgraphs, MergeCommonSubexpressions, RemoveAsserts, RemoveNoOps


class Rule(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, x):
        return self.rule(x)


def raw(rule, x):
    return torch.export.export(Rule(rule).eval(), (x,), strict=False).module()


def test_a_region_without_gradients_is_inlined(lab):
    def rule(x):
        with torch.no_grad():
            y, z = x.cos(), x.sin()
        return y + z * 2

    x = torch.randn(3, 4)
    gm = raw(rule, x)
    assert any("wrap_with_set_grad_enabled" in op for op in lab.ops(gm))
    _, difference = lab.check_run(InlineSubgraphs(), gm, x, matched=1)
    assert difference == 0
    assert set(lab.ops(gm)) == {"aten.cos.default", "aten.sin.default", "aten.mul.Tensor", "aten.add.Tensor"}
    assert list(gm.named_children()) == [] or all("submod" not in name for name, _ in gm.named_children())


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_inlined_only_where_it_does_nothing(lab, enabled):
    def rule(x):
        with torch.autocast("cpu", enabled=enabled, dtype=torch.bfloat16):
            y = x @ x
        return y.float() + 1

    x = torch.randn(4, 4)
    gm = raw(rule, x)
    wanted = gm(x)
    result = InlineSubgraphs().run(gm)
    assert result.matched == (not enabled)
    assert ["autocast is enabled" in skip.reason for skip in result.skipped] == [True] * enabled
    assert torch.equal(gm(x), wanted)


def test_assertions_of_the_export_go(lab):
    x = torch.randn(3, 4)
    gm = raw(lambda x: x.to(torch.bfloat16).to(torch.float32) + 1, x)
    assert any("_assert_tensor_metadata" in op for op in lab.ops(gm))
    result = RemoveAsserts().run(gm)
    assert result.matched >= 2  # the casts' and the input guards
    assert not any("assert" in op for op in lab.ops(gm))
    assert RemoveAsserts().run(gm).matched == 0
    assert gm(x).shape == x.shape


@pytest.mark.parametrize(
    "rule",
    [
        lambda x: x.to(torch.float32) + 1,
        lambda x: x.type_as(x) + 1,
        lambda x: x.clone() + 1,
        lambda x: torch.ops.aten.alias(x) + 1,
        lambda x: x.detach() + 1,
        lambda x: nn.functional.dropout(x, 0.5, training=False) + 1,
        lambda x: nn.functional.dropout(x, 0.0, training=True) + 1,
        lambda x: x[:, 0:] + 1,
        lambda x: x[:, :8] + 1,
        lambda x: x.view(3, 8) + 1,
        lambda x: x.reshape(-1, 8) + 1,
        lambda x: x.expand(3, 8) + 1,
        lambda x: x * 1.0 + 1,
        lambda x: x / 1 + 1,
        lambda x: torch.cat([x]) + 1,
        lambda x: torch.cat([x, x[:, 8:]], dim=1) + 1,
    ],
)
def test_what_changes_nothing_goes(lab, rule):
    x = torch.randn(3, 8)
    gm = raw(rule, x)
    RemoveAsserts().run(gm)
    wanted = gm(x)
    assert RemoveNoOps().run(gm).matched >= 1
    assert lab.ops(gm) == {"aten.add.Tensor": 1}
    assert torch.equal(gm(x), wanted)
    assert RemoveNoOps().run(gm).matched == 0


@pytest.mark.parametrize(
    "rule",
    [
        lambda x: x.to(torch.bfloat16),
        lambda x: x.t().contiguous(),
        lambda x: x[:, 1:],
        lambda x: x[:, ::2],
        lambda x: x.view(8, 3),
        lambda x: x * 1.5,
        lambda x: torch.cat([x, x]),
    ],
)
def test_what_changes_something_stays(lab, rule):
    x = torch.randn(3, 8)
    gm = raw(rule, x)
    RemoveAsserts().run(gm)
    before = lab.ops(gm)
    assert RemoveNoOps().run(gm).matched == 0
    assert lab.ops(gm) == before


def test_a_copy_that_protects_from_a_later_write_stays(lab):
    def rule(x):
        y = x + 1
        kept = y.clone()
        y.mul_(3)
        return kept + y

    x = torch.randn(3, 8)
    gm = raw(rule, x)
    RemoveAsserts().run(gm)
    result, difference = lab.check_run(RemoveNoOps(), gm, x, matched=0)
    assert difference == 0
    assert ["written to in place" in skip.reason for skip in result.skipped] == [True]


def test_dead_code_goes_but_writes_stay(lab):
    def rule(x):
        x.cumsum(0)  # dead
        y = x * 2
        y[0].zero_()
        return y

    x = torch.randn(3, 8)
    gm = raw(rule, x)
    RemoveAsserts().run(gm)
    RemoveNoOps().run(gm)
    assert "aten.cumsum.default" not in lab.ops(gm)
    assert torch.equal(gm(x), rule(x.clone()))


def test_equal_expressions_are_computed_once(lab):
    x = torch.randn(3, 8)
    gm = raw(lambda x: x.cos() * x.cos() + x.unsqueeze(1).squeeze(1) + x.unsqueeze(1).squeeze(1), x)
    _, difference = lab.check_run(MergeCommonSubexpressions(), gm, x, matched=3)
    assert difference == 0


def test_arguments_that_python_finds_equal_are_not_the_same(lab):
    x = torch.arange(4)
    gm = raw(lambda x: (x * 1).float() + (x * 1.0) + (x * True), x)
    _, difference = lab.check_run(MergeCommonSubexpressions(), gm, x, matched=0)
    assert difference == 0


def test_random_numbers_and_written_tensors_are_not_merged(lab):
    def rule(x):
        a, b = x + 1, x + 1
        a.mul_(2)
        return a + b

    x = torch.randn(3, 8)
    gm = raw(rule, x)
    result, difference = lab.check_run(MergeCommonSubexpressions(), gm, x, matched=0)
    assert difference == 0
    assert len(result.skipped) == 1
    gm = raw(lambda x: torch.rand_like(x) - torch.rand_like(x), x)
    assert MergeCommonSubexpressions().run(gm).matched == 0
