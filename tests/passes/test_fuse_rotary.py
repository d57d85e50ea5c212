"""FuseRotary: every way in which transformers' families rotate q and k."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from qcompiler.passes import FuseRotary

ROTARY = "qcompiler.rotary.default"
HEADS, TOKENS, WIDTH = 4, 6, 16


class Rotate(nn.Module):
    """Applies `rule(q, k, cos, sin)` and lays q and k side by side."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, q, k, cos, sin):
        return torch.cat(self.rule(q, k, cos, sin), dim=1)


def tensors(columns: int, dtype: torch.dtype, table_dtype: torch.dtype | None = None):
    """q [1, 4, T, 16], k [1, 2, T, 16] as views of token-major tensors, cos and sin [1, T, columns]."""
    q, k = (torch.randn(1, TOKENS, h, WIDTH, dtype=dtype).transpose(1, 2) for h in (HEADS, 2))
    angle = torch.randn(1, TOKENS, columns)
    return q, k, angle.cos().to(table_dtype or dtype), angle.sin().to(table_dtype or dtype)


def function(module: str, name: str = "apply_rotary_pos_emb"):
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "columns", "interleaved"),
    [
        ("llama", WIDTH, False),
        ("phi3", WIDTH, False),
        ("gpt_neox", WIDTH // 4, False),  # partial
        ("glm", WIDTH // 2, True),  # partial, interleaved
        ("cohere", WIDTH, True),
        ("ernie4_5", WIDTH, True),
        ("gpt_oss", WIDTH // 2, False),  # tables of half the channels
    ],
)
def test_rotations_of_transformers_become_one_op_each_bit_for_bit(lab, module, columns, interleaved, dtype):
    inputs = tensors(columns, dtype)
    gm = lab.export(Rotate(function(module)), *inputs)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=2)
    assert difference == 0
    nodes = [n for n in gm.graph.nodes if str(n.target) == ROTARY]
    assert [n.args[3] for n in nodes] == [interleaved] * 2
    assert nodes[0].args[1:3] == nodes[1].args[1:3]  # q and k share their tables
    assert not set(lab.ops(gm)) & {
        "aten.neg.default",
        "aten.add.Tensor",
        "aten.sub.Tensor",
        "aten.stack.default",
    }


def test_tables_in_fp32_with_a_rounding_at_the_end(lab):
    """OLMo 2 multiplies bf16 channels by fp32 tables and rounds once."""
    inputs = tensors(WIDTH, torch.bfloat16, torch.float32)
    gm = lab.export(Rotate(function("olmo2")), *inputs)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=2)
    assert difference == 0
    assert lab.ops(gm) == {ROTARY: 2, "aten.cat.default": 1}


def test_even_and_odd_channels_moved_apart(lab):
    """DeepSeek V3 rotates neighbours but writes them as halves."""
    q, k, cos, sin = tensors(WIDTH, torch.float32)
    gm = lab.export(Rotate(function("deepseek_v3", "apply_rotary_pos_emb_interleave")), q, k, cos, sin)
    result = FuseRotary().run(gm)
    wanted = torch.cat(function("deepseek_v3", "apply_rotary_pos_emb_interleave")(q, k, cos, sin), dim=1)
    assert result.matched == 2
    assert torch.equal(gm(q, k, cos, sin), wanted)
    assert lab.ops(gm)[ROTARY] == 2


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def test_heads_behind_tokens_are_moved_for_the_op(lab):
    """[B, T, H, D] with tables [B, T, 1, R], as GPT-J has it."""

    def rule(q, k, cos, sin):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return tuple((x * cos + rotate_half(x) * sin).transpose(1, 2) for x in (q, k))

    inputs = tensors(WIDTH, torch.float32)
    gm = lab.export(Rotate(rule), *inputs)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=2)
    assert difference == 0


def test_tables_of_two_dimensions(lab):
    q, k, cos, sin = tensors(WIDTH, torch.float32)
    inputs = (q, k, cos[0], sin[0])
    gm = lab.export(Rotate(lambda q, k, c, s: tuple(c * x + s * rotate_half(x) for x in (q, k))), *inputs)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=2)
    assert difference == 0


def test_layers_share_what_they_derive_from_the_tables(lab):
    """Two layers that each double the same half tables get them doubled once."""

    def rule(q, k, cos, sin):
        q, k = function("gpt_oss")(q, k, cos, sin)
        return function("gpt_oss")(q, k, cos, sin)

    inputs = tensors(WIDTH // 2, torch.float32)
    gm = lab.export(Rotate(rule), *inputs)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=4)
    assert difference == 0
    assert lab.ops(gm) == {ROTARY: 4, "aten.cat.default": 3}  # cos, sin, and the test's own


def test_ragged_tokens_stay_symbolic(lab):
    class Model(nn.Module):
        def forward(self, x, angle):
            cos, sin = angle.cos()[:, :, 0:WIDTH], angle.sin()[:, :, 0:WIDTH]
            q = x.view(1, -1, HEADS, WIDTH).transpose(1, 2)
            return function("llama")(q, q, cos, sin)[0]

    inputs = torch.randn(1, 7, HEADS * WIDTH), torch.randn(1, 7, HEADS * WIDTH)
    gm = lab.export(Model(), *inputs, dynamic=1)
    _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=1)
    assert difference == 0
    assert gm(torch.randn(1, 3, HEADS * WIDTH), torch.randn(1, 3, HEADS * WIDTH)).shape == (
        1,
        HEADS,
        3,
        WIDTH,
    )


def wrong_sign(x):
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), dim=-1)


def wrong_split(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


@pytest.mark.parametrize("turn", [wrong_sign, wrong_split, lambda x: -x])
def test_what_is_no_rotation_is_not_looked_at(lab, turn):
    inputs = tensors(WIDTH, torch.float32)
    gm = lab.export(Rotate(lambda q, k, c, s: (q * c[:, None] + turn(q) * s[:, None], k)), *inputs)
    result, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=0)
    assert difference == 0
    assert result.skipped == []


def test_the_turned_tensor_must_be_the_one_scaled(lab):
    inputs = tensors(WIDTH, torch.float32)
    gm = lab.export(Rotate(lambda q, k, c, s: (q * c[:, None] + rotate_half(q * 2) * s[:, None], k)), *inputs)
    lab.check_run(FuseRotary(), gm, *inputs, matched=0)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda q, k, c, s: (((h := q[0]) * c + rotate_half(h) * s)[None], k), "3 dimensions"),
        (
            lambda q, k, c, s: (q * c[:, None, :, :1] + rotate_half(q) * s[:, None], k),
            "1 columns for 16 channels",
        ),
        (lambda q, k, c, s: (q * c[:, None] + rotate_half(q) * s, k), "different ranks"),
        (
            lambda q, k, c, s: (
                q.float() * c.float()[:, None] + rotate_half(q.float()) * s.float()[:, None],
                k,
            ),
            None,
        ),
    ],
)
def test_near_misses_say_why(lab, rule, reason):
    dtype = torch.float32 if reason else torch.bfloat16
    inputs = tensors(WIDTH, dtype)
    gm = lab.export(Rotate(rule), *inputs)
    if reason is None:  # the result stays in fp32: fused over the widened input
        _, difference = lab.check_run(FuseRotary(), gm, *inputs, matched=1)
        assert difference == 0
        return
    result, _ = lab.check_run(FuseRotary(), gm, *inputs, matched=0)
    assert [reason in skip.reason for skip in result.skipped] == [True]
