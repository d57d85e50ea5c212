"""AddmmToLinear: GPT-2's Conv1D and other products with a parameter become aten.linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import AddmmToLinear, Loaded, resolve, weight_recipes

LINEAR = "aten.linear.default"
ROUNDING = 1e-6  # the transposed product may add in another order


def test_conv1d_and_its_views_become_one_linear(lab):
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 16)
    nn.init.normal_(conv.bias)
    x = torch.randn(1, 5, 16)
    gm = lab.export(conv, x, dynamic=1)
    stored = conv.weight.detach().clone()
    _, difference = lab.check_run(AddmmToLinear(), gm, x, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm) == {LINEAR: 1}
    assert sorted(name for name, _ in (*gm.named_parameters(), *gm.named_buffers())) == ["bias", "weight_t"]
    assert weight_recipes(gm) == {"weight_t": Loaded("weight", transposed=True)}
    assert torch.equal(resolve(weight_recipes(gm)["weight_t"], {"weight": stored}.__getitem__), gm.weight_t)


class Product(nn.Module):
    def __init__(self, rule, *shape):
        super().__init__()
        self.rule = rule
        self.w, self.b = nn.Parameter(torch.randn(*shape)), nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x):
        return self.rule(x, self.w, self.b)


@pytest.mark.parametrize(
    ("rule", "shape", "transposes"),
    [
        (lambda x, w, b: x @ w, (16, 24), True),
        (lambda x, w, b: x @ w.t(), (24, 16), False),
        (lambda x, w, b: x @ w.T, (24, 16), False),
        (lambda x, w, b: x @ w.transpose(0, 1), (24, 16), False),
        (lambda x, w, b: torch.matmul(x, w.permute(1, 0)), (24, 16), False),
        (lambda x, w, b: torch.addmm(b, x[0], w)[None], (16, 24), True),
        (lambda x, w, b: torch.mm(x[0], w)[None], (16, 24), True),
        (lambda x, w, b: nn.functional.linear(x, w.t()), (16, 24), True),
        (lambda x, w, b: nn.functional.linear(x, w.t(), b), (16, 24), True),
    ],
)
def test_products_with_a_parameter(lab, rule, shape, transposes):
    x = torch.randn(1, 5, 16)
    gm = lab.export(Product(rule, *shape), x)
    _, difference = lab.check_run(AddmmToLinear(), gm, x, matched=1)
    assert difference < ROUNDING
    assert lab.ops(gm)[LINEAR] == 1
    assert weight_recipes(gm) == ({"w_t": Loaded("w", transposed=True)} if transposes else {})


def test_a_weight_used_both_ways_is_kept_both_ways(lab):
    """GPT-2's tied head reads the embedding matrix as it is; nothing else may turn it."""
    x = torch.randn(1, 5, 16)
    gm = lab.export(Product(lambda x, w, b: nn.functional.linear(x @ w, w), 16, 16), x)
    _, difference = lab.check_run(AddmmToLinear(), gm, x, matched=1)
    assert difference < ROUNDING
    assert {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())} == {"w", "w_t"}


def test_a_plain_linear_is_left_alone(lab):
    x = torch.randn(2, 16)
    result, _ = lab.check_run(AddmmToLinear(), lab.export(nn.Linear(16, 4), x), x, matched=0)
    assert result.skipped == []


@pytest.mark.parametrize(
    ("rule", "shape", "reason"),
    [
        (lambda x, w, b: torch.addmm(b, x[0], w, alpha=2), (16, 24), "alpha or beta"),
        (lambda x, w, b: torch.addmm(x[0], x[0], w), (16, 16), "not one entry per output"),
        (lambda x, w, b: x @ w, (1, 16, 24), "3 dimensions"),
        (lambda x, w, b: x[0, 0] @ w, (16, 24), "single vector"),
    ],
)
def test_near_misses_say_why(lab, rule, shape, reason):
    x = torch.randn(1, 5, 16)
    gm = lab.export(Product(rule, *shape), x)
    result, difference = lab.check_run(AddmmToLinear(), gm, x, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_a_product_of_two_activations_is_no_linear(lab):
    x = torch.randn(1, 5, 16)
    result, _ = lab.check_run(
        AddmmToLinear(), lab.export(Product(lambda x, w, b: x @ x.transpose(1, 2), 1, 1), x), x, matched=0
    )
    assert result.skipped == []
