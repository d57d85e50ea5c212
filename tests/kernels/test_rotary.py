"""`rotary`: every way transformers writes it down, whole and partial heads."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target
from tolerances import assert_close
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError

OP = torch.ops.qcompiler.rotary.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(batch, tokens, rotated, interleaved):
    """cos and sin [B, T, R] laid out as the op takes them, and the [B, T, R/2] angles."""
    positions = torch.arange(tokens).float() + 3 * torch.arange(batch).float()[:, None]
    half = positions[..., None] * 100.0 ** -(torch.arange(0, rotated, 2) / rotated)
    full = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return full.cos(), full.sin(), half


def heads(batch=2, count=3, tokens=5, dim=16):
    return torch.randn(batch, count, tokens, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_llama_bit_for_bit(dtype):
    x = heads().to(dtype)
    cos, sin, _ = (t.to(dtype) for t in angles(2, 5, 16, False))
    wanted, _ = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(OP(x, cos, sin, False), wanted)
    assert torch.equal(OP(x, cos.unsqueeze(1), sin.unsqueeze(1), False), wanted)


def test_interleaved_is_cohere():
    x = heads()
    cos, sin, _ = angles(2, 5, 16, True)
    wanted, _ = modeling_cohere.apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(OP(x, cos, sin, True), wanted)


def test_interleaved_partial_is_glm():
    x = heads()
    halves_cos, halves_sin, _ = angles(2, 5, 8, False)
    cos, sin, _ = angles(2, 5, 8, True)
    wanted, _ = modeling_glm.apply_rotary_pos_emb(x, x, halves_cos, halves_sin)
    assert torch.equal(OP(x, cos, sin, True), wanted)


def test_interleaved_is_gptj_with_heads_last():
    x = heads()
    cos, sin, half = angles(2, 5, 16, True)
    wanted = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), half.sin(), half.cos())
    assert torch.equal(OP(x, cos, sin, True), wanted.transpose(1, 2))


def test_interleaved_is_the_complex_product_of_llama4():
    x = heads()
    cos, sin, half = angles(2, 5, 16, True)
    turns = torch.polar(torch.ones_like(half), half)
    wanted, _ = modeling_llama4.apply_rotary_emb(x.transpose(1, 2), x.transpose(1, 2), turns)
    assert_close(OP(x, cos, sin, True), wanted.transpose(1, 2))


def test_wide_tables_widen_the_product_but_not_the_result():
    x = heads().half()
    cos, sin, _ = angles(2, 5, 16, False)
    y = OP(x, cos, sin, False)
    assert y.dtype == torch.float16
    assert torch.equal(y, modeling_llama.apply_rotary_pos_emb(x.float(), x.float(), cos, sin)[0].half())


def test_a_transposed_view_stays_one():
    x = heads().transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin, _ = angles(2, 5, 16, False)
    assert OP(x, cos, sin, False).stride() == x.stride()


@pytest.mark.parametrize("rotated", [5, 18])
def test_a_table_that_does_not_fit_is_refused(rotated):
    table = torch.ones(1, 5, rotated)
    with pytest.raises(InvalidInputError, match=f"{rotated} columns cannot rotate 16"):
        OP(heads(1), table, table, False)


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    cos, sin, _ = angles(2, 5, 8, interleaved)
    torch.library.opcheck(OP, (heads().transpose(1, 2).contiguous().transpose(1, 2), cos, sin, interleaved))


@on_triton
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(16, 16), (24, 24), (80, 32), (20, 6)])
def test_kernel_agrees(dim, rotated, interleaved, target):
    from qcompiler.kernels.triton.rotary import rotary

    cos, sin, _ = angles(2, 5, rotated, interleaved)
    x, cos, sin = to_target(target, heads(dim=dim), cos, sin)
    wanted = OP(x.cpu(), cos.cpu(), sin.cpu(), interleaved)
    assert_close(rotary(poisoned(x), poisoned(cos), poisoned(sin), interleaved), wanted)
    assert_close(rotary(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved), wanted)
    last = (x.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2))  # heads after tokens
    assert_close(rotary(*last, interleaved), wanted.transpose(1, 2))
