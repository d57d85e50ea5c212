"""`rms_norm` and `add_rms_norm`: the norms of Llama and Gemma as transformers writes them."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target
from tolerances import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import qcompiler.kernels.ops  # noqa: F401

NORM = torch.ops.qcompiler.rms_norm.default
ADD_NORM = torch.ops.qcompiler.add_rms_norm.default
EPS = 1e-6
FAMILIES = {"llama": (LlamaRMSNorm, 0.0, True), "gemma": (GemmaRMSNorm, 1.0, False)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(shape=(2, 5, 80), seed=0):
    g = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(shape, generator=g) * 3, torch.randn(shape, generator=g)
    return x, residual, torch.randn(shape[-1], generator=g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_transformers_bit_for_bit(family, dtype):
    module, offset, cast_first = FAMILIES[family]
    x, _, weight = (t.to(dtype) for t in case())
    norm = module(80, eps=EPS).to(dtype)
    norm.weight.data.copy_(weight)
    with torch.no_grad():
        assert torch.equal(NORM(x, weight, EPS, offset, cast_first), norm(x))


def test_without_weight_the_mean_square_is_one():
    x, _, _ = case()
    y = NORM(x, None, 0.0, 0.0, True)
    assert_close(y.square().mean(-1), torch.ones(2, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_addition_and_then_the_norm(dtype):
    x, residual, weight = (t.to(dtype) for t in case())
    y, total = ADD_NORM(x, residual, weight, EPS, 0.0, True)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, NORM(x + residual, weight, EPS, 0.0, True))


def test_large_values_do_not_overflow_fp16():
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    assert_close(NORM(x, None, EPS, 0.0, True), torch.ones(1, 64))


@pytest.mark.parametrize("shape", [(3, 16), (1, 5, 4, 16)])
def test_opcheck(shape):
    x, residual, weight = case(shape)
    torch.library.opcheck(NORM, (x, weight, EPS, 1.0, False))
    torch.library.opcheck(NORM, (x.transpose(0, 1), None, EPS, 0.0, True))
    torch.library.opcheck(ADD_NORM, (x, residual, weight, EPS, 0.0, True))


@on_triton
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 80), (3, 5, 128), (2, 3, 4, 24), (1, 2100)])
def test_kernel_agrees(shape, family, target):
    from qcompiler.kernels.triton import norms

    _, offset, cast_first = FAMILIES[family]
    x, residual, weight = to_target(target, *case(shape))
    assert_close(
        norms.rms_norm(poisoned(x), weight, EPS, offset, cast_first),
        NORM(x.cpu(), weight.cpu(), EPS, offset, cast_first),
    )
    found = norms.add_rms_norm(poisoned(x), poisoned(residual), weight, EPS, offset, cast_first)
    wanted = ADD_NORM(x.cpu(), residual.cpu(), weight.cpu(), EPS, offset, cast_first)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@on_triton
def test_kernel_reads_heads_inside_a_fused_projection_in_place(target):
    from qcompiler.kernels.triton import norms
    from qcompiler.kernels.triton.launch import as_rows

    (fused,) = to_target(target, torch.randn(1, 7, 200))
    heads = fused[..., :96].unflatten(-1, (4, 24))
    assert as_rows(heads)[0].data_ptr() == fused.data_ptr()
    for x in (heads, heads.transpose(1, 2), fused[..., 50:90]):
        assert_close(norms.rms_norm(x, None, EPS, 0.0, True), NORM(x.cpu(), None, EPS, 0.0, True))
