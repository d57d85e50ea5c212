"""FuseRMSNorm: the norms of transformers and torch, and graphs that only look like one."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.passes import FuseRMSNorm

RMS = "qcompiler.rms_norm.default"

# class, module, (offset, cast_first) the op must carry in bf16
NORMS = [
    ("LlamaRMSNorm", "llama", 0.0, True),
    ("Gemma2RMSNorm", "gemma2", 1.0, False),
    ("Olmo2RMSNorm", "olmo2", 0.0, False),
    ("GptOssRMSNorm", "gpt_oss", 0.0, False),
    ("Qwen3RMSNorm", "qwen3", 0.0, True),
    ("Llama4TextRMSNorm", "llama4", 0.0, True),
    ("HeliumRMSNorm", "helium", 0.0, False),
]


def transformers_norm(name: str, module: str, dtype: torch.dtype) -> nn.Module:
    cls = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    norm = cls(32, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "module", "offset", "cast_first"), NORMS)
def test_norms_of_transformers_become_one_op_bit_for_bit(lab, name, module, offset, cast_first, dtype):
    x = torch.randn(2, 5, 32, dtype=dtype)
    gm = lab.export(transformers_norm(name, module, dtype), x)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert lab.ops(gm) == {RMS: 1}
    assert difference == 0
    (node,) = [n for n in gm.graph.nodes if str(n.target) == RMS]
    assert node.args[2] == pytest.approx(1e-5)
    assert node.args[3] == offset
    if dtype == torch.bfloat16:
        assert node.args[4] is cast_first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_without_weight(lab, dtype):
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

    x = torch.randn(2, 3, 5, 16, dtype=dtype)
    gm = lab.export(Llama4TextL2Norm(), x)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert difference == 0
    (node,) = [n for n in gm.graph.nodes if str(n.target) == RMS]
    assert node.args[1] is None


@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_rms_norm_rounds_last(lab, dtype, eps):
    norm = nn.RMSNorm(32, eps=eps, dtype=dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 32, dtype=dtype) * 1e-3  # small, so that eps matters
    gm = lab.export(norm, x)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert difference <= (1e-6 if dtype == torch.float32 else 0)


def test_qk_norm_runs_over_the_channels_of_a_head(lab):
    norm = transformers_norm("Qwen3RMSNorm", "qwen3", torch.float32)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x.view(1, -1, 4, 32).transpose(1, 2))

    x = torch.randn(1, 6, 128)
    gm = lab.export(Heads(), x, dynamic=1)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert difference == 0


class Written(nn.Module):
    """An RMSNorm spelled by `rule`."""

    def __init__(self, rule, dtype=torch.float32):
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.randn(32, dtype=dtype))

    def forward(self, x):
        return self.rule(x, self.weight)


@pytest.mark.parametrize(
    ("rule", "tolerance"),
    [
        (lambda x, w: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)), 0),
        (lambda x, w: (x * torch.rsqrt(1e-6 + x.square().mean(-1, True))) * (w + 1.0), 0),
        # Another root: rsqrt is within a unit in the last place of these.
        (lambda x, w: w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)), 1e-6),
        (lambda x, w: w * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), 1e-6),
    ],
)
def test_other_spellings(lab, rule, tolerance):
    x = torch.randn(3, 32)
    gm = lab.export(Written(rule), x)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert difference <= tolerance
    assert lab.ops(gm) == {RMS: 1}


def test_a_weight_in_a_wider_dtype_stays_outside(lab):
    """bf16 · fp32 weight gives fp32, which the op, rounding to x's dtype, could not return."""

    def rule(x, w):
        wide = x.float()
        return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    x = torch.randn(3, 32, dtype=torch.bfloat16)
    gm = lab.export(Written(rule), x)
    _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
    assert difference == 0
    assert lab.ops(gm) == {RMS: 1, "aten.mul.Tensor": 1}


NEAR_MISSES = [
    (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        torch.float32,
        "not the last",
    ),
    (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean() + 1e-6)), torch.float32, "all dimensions"),
    (
        lambda x, w: w * (w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        torch.float32,
        "another tensor",
    ),
    (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), torch.bfloat16, "bfloat16"),
    (
        lambda x, w: (
            w.float() * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)) + x
        ),
        torch.bfloat16,
        None,
    ),
    (
        lambda x, w: (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * x + r * w,
        torch.float32,
        "one tensor only",
    ),
]


@pytest.mark.parametrize(("rule", "dtype", "reason"), NEAR_MISSES)
def test_near_misses_say_why(lab, rule, dtype, reason):
    x = torch.randn(32, 32, dtype=dtype)
    gm = lab.export(Written(rule, dtype), x)
    if reason is None:  # fp32 throughout from a bf16 input: fused over the widened input
        _, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=1)
        assert difference == 0
        return
    result, difference = lab.check_run(FuseRMSNorm(), gm, x, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]


def test_cubes_are_not_looked_at(lab):
    x = torch.rand(3, 32)
    gm = lab.export(Written(lambda x, w: w * x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)), x)
    result, _ = lab.check_run(FuseRMSNorm(), gm, x, matched=0)
    assert result.skipped == []


def test_eager_op_is_the_reference():
    """The op itself against torch, so that the comparisons above mean something."""
    x, w = torch.randn(4, 32), torch.randn(32)
    torch.testing.assert_close(
        torch.ops.qcompiler.rms_norm(x, w, 1e-5, 0.0, False),
        F.rms_norm(x, (32,), w, 1e-5),
        rtol=1e-6,
        atol=1e-6,
    )
