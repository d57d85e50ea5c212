"""FuseLayerNorm: torch's op, Cohere's spelling, and what must stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.passes import FuseLayerNorm, FuseRMSNorm

LAYER = "qcompiler.layer_norm.default"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
def test_torchs_layer_norm(lab, dtype, affine, bias):
    norm = nn.LayerNorm(32, elementwise_affine=affine, bias=bias).to(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    gm = lab.export(norm, x)
    _, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=1)
    assert lab.ops(gm) == {LAYER: 1}
    assert difference == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coheres_layer_norm(lab, dtype):
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    norm = CohereLayerNorm(32).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 32, dtype=dtype) + 1
    gm = lab.export(norm, x)
    _, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=1)
    assert lab.ops(gm) == {LAYER: 1}
    # torch's kernel takes mean and variance in one sweep; one unit in the last place of bf16 is 2^-8.
    assert difference <= (1e-6 if dtype == torch.float32 else 2**-8)


def test_coheres_norm_per_head_keeps_its_weight_matrix(lab):
    """q_norm of Cohere has a weight per head and channel; only the vector part of LayerNorm is fused."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    norm = CohereLayerNorm((4, 8))
    nn.init.normal_(norm.weight)
    x = torch.randn(1, 5, 4, 8)
    gm = lab.export(norm, x)
    _, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=1)
    assert lab.ops(gm) == {LAYER: 1, "aten.mul.Tensor": 1}
    assert difference < 1e-6


class Written(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.weight, self.bias = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))

    def forward(self, x):
        return self.rule(x, self.weight, self.bias)


def centred(x):
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, w, b: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5) * w + b,
        lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * w + b,
        lambda x, w, b: torch.native_layer_norm(x, [32], w, b, 1e-5)[0],
    ],
)
def test_other_spellings_with_bias(lab, rule):
    x = torch.randn(3, 32) + 2
    gm = lab.export(Written(rule), x)
    _, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=1)
    assert set(lab.ops(gm)) == {LAYER}
    assert difference < 1e-5


def test_an_offset_on_the_weight_stays_an_addition(lab):
    x = torch.randn(3, 32)
    gm = lab.export(Written(lambda x, w, b: F.layer_norm(x, (32,), w + 1, b)), x)
    _, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=1)
    assert lab.ops(gm) == {LAYER: 1, "aten.add.Tensor": 1}
    assert difference == 0


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda x, w, b: F.layer_norm(x, (4, 32)), "not the last dimension"),
        (
            lambda x, w, b: torch.stack(torch.native_layer_norm(x, [4, 32], None, None, 1e-5)[1:]),
            "not the last",
        ),
        (lambda x, w, b: x * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5), "another tensor"),
    ],
)
def test_near_misses_say_why(lab, rule, reason):
    x = torch.randn(2, 4, 32)
    gm = lab.export(Written(rule), x)
    result, difference = lab.check_run(FuseLayerNorm(), gm, x, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_a_variance_with_bessels_correction_is_another_norm(lab):
    x = torch.randn(3, 32)
    gm = lab.export(Written(lambda x, w, b: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)), x)
    lab.check_run(FuseLayerNorm(), gm, x, matched=0)


def test_an_rms_norm_is_left_to_its_own_pass(lab):
    x = torch.randn(3, 32)
    gm = lab.export(Written(lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w), x)
    result, _ = lab.check_run(FuseLayerNorm(), gm, x, matched=0)
    assert result.skipped == []
    assert FuseRMSNorm().run(gm).matched == 1
