"""The op `qcompiler::linear_affine`: its reference against a dense linear, its fake, refused arguments."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import BITS, GROUP_SIZES, num_groups


def quantized(spec: AffineSpec, n: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5) / 2**spec.bits
    zeros = torch.rand(n, groups, generator=generator) * (2**spec.bits - 1)
    return AFFINE.pack(spec, codes, scales, zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_a_linear_on_the_dequantized_weight(bits, group_size, dtype):
    n, k = 24, 200
    spec = AffineSpec(bits, group_size)
    tensors = quantized(spec, n, k)
    x = torch.randn(2, 5, k).to(dtype)
    bias = torch.randn(n).to(dtype)
    op, arguments = AFFINE.op_call(spec, x, tensors, bias, k)
    y = op(*arguments)
    dense = AFFINE.dequantize(spec, tensors, k, torch.float64)
    wanted = x.double() @ dense.T + bias.double()
    assert y.shape == (2, 5, n)
    assert y.dtype == dtype
    # One rounding to the output dtype, after float32 sums of 200 terms.
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(bits, with_bias):
    spec = AffineSpec(bits, 32)
    bias = torch.randn(10) if with_bias else None
    op, arguments = AFFINE.op_call(spec, torch.randn(3, 70), quantized(spec, 10, 70), bias, 70)
    torch.library.opcheck(op, arguments)


def test_fake_takes_a_symbolic_token_axis():
    spec = AffineSpec(4, 64)
    tensors = quantized(spec, 10, 128)

    class Linear(torch.nn.Module):
        def forward(self, x):
            op, arguments = AFFINE.op_call(spec, x, tensors, None, 128)
            return op(*arguments)

    exported = torch.export.export(
        Linear(), (torch.randn(1, 7, 128),), dynamic_shapes=({1: torch.export.Dim("tokens")},)
    )
    x = torch.randn(1, 3, 128)
    torch.testing.assert_close(exported.module()(x), Linear()(x))


def test_no_tokens_give_no_rows():
    spec = AffineSpec(4, 64)
    op, arguments = AFFINE.op_call(spec, torch.randn(0, 128), quantized(spec, 10, 128), None, 128)
    assert op(*arguments).shape == (0, 10)


def test_wrong_arguments_are_refused_by_name():
    spec = AffineSpec(4, 64)
    tensors = quantized(spec, 10, 128)
    op, arguments = AFFINE.op_call(spec, torch.randn(3, 100), tensors, None, 128)
    with pytest.raises(InvalidInputError, match="x has 100 features"):
        op(*arguments)
    op, arguments = AFFINE.op_call(AffineSpec(5, 64), torch.randn(3, 128), tensors, None, 128)
    with pytest.raises(InvalidInputError, match="5-bit codes and high=None"):
        op(*arguments)
