"""`layer_norm`: torch's own, with fp32 statistics whatever the dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import on_triton, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401

OP = torch.ops.qcompiler.layer_norm.default
EPS = 1e-5


def case(shape):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=g),
        torch.randn(shape[-1], generator=g),
        torch.randn(shape[-1], generator=g),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_reference_is_layer_norm(affine, dtype):
    x, *parameters = (t.to(dtype) for t in case((3, 50)))
    weight, bias = (p if used else None for p, used in zip(parameters, affine, strict=True))
    wide = [None if t is None else t.double() for t in (weight, bias)]
    assert_close(OP(x, weight, bias, EPS), F.layer_norm(x.double(), (50,), *wide, EPS))


def test_parameters_may_be_wider_than_the_input():
    x, weight, bias = case((3, 50))
    y = OP(x.half(), weight, bias, EPS)
    assert y.dtype == torch.float16
    assert_close(y, F.layer_norm(x.half().float(), (50,), weight, bias, EPS))


def test_opcheck():
    x, weight, bias = case((2, 3, 16))
    torch.library.opcheck(OP, (x, weight, bias, EPS))
    torch.library.opcheck(OP, (x.transpose(0, 1), None, None, EPS))


@on_triton
@pytest.mark.parametrize("shape", [(1, 2), (7, 80), (3, 5, 128), (1, 2100)])
def test_kernel_agrees(shape, target):
    from qcompiler.kernels.triton.norms import layer_norm

    x, weight, bias = to_target(target, *case(shape))
    for w, b in ((weight, bias), (weight, None), (None, None)):
        wide = [None if t is None else t.cpu().double() for t in (w, b)]
        wanted = F.layer_norm(x.cpu().double(), shape[-1:], *wide, EPS)
        assert_close(layer_norm(poisoned(x), w, b, EPS), wanted)


@on_triton
def test_kernel_survives_a_mean_far_from_zero(target):
    from qcompiler.kernels.triton.norms import layer_norm

    (x,) = to_target(target, 500 + torch.randn(4, 100))
    wanted = F.layer_norm(x.cpu().double(), (100,), None, None, EPS)
    assert_close(layer_norm(x, None, None, EPS), wanted, scale=8)  # the mean takes three bits of x − mean
