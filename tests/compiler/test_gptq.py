"""GPTQ against rounding, against its own definition, and in the format that it stores."""

from __future__ import annotations

import pytest
import torch

from qcompiler.calibration import Moments
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.methods.base import get_method
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.methods.gptq import feedback_codes, group_ranges


def problem(n: int = 32, k: int = 96):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(400, k, generator=generator) @ (torch.randn(k, k, generator=generator) / k**0.5)
    x = x * torch.logspace(0.5, -1, k)
    return weight, x, Moments(x.T @ x / 400, None, 400)


def dequantized(parts, spec, k):
    return AFFINE.dequantize(spec, AFFINE.pack(spec, *parts), k, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 64])
def test_outputs_come_nearer_than_by_rounding(bits, group_size):
    weight, x, moments = problem()
    spec = AffineSpec(bits, group_size)
    found = dequantized(feedback_codes(weight, moments, spec), spec, 96)
    scales, zeros = group_ranges(weight, moments.gram.diagonal(), spec)
    group = torch.arange(96) // (group_size or 96)
    codes = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, 2**bits - 1).to(torch.uint8)
    rounded = dequantized((codes, scales, zeros), spec, 96)
    error, error_rounded = ((x @ (w - weight).T).norm() for w in (found, rounded))
    assert error < 0.8 * error_rounded


def test_uncorrelated_inputs_leave_plain_rounding():
    """With a diagonal Gram matrix no column can make up for another."""
    weight, _, _ = problem()
    spec = AffineSpec(3, 64)
    moments = Moments(torch.diag(torch.linspace(1, 3, 96)), None, 400)
    codes, scales, zeros = feedback_codes(weight, moments, spec)
    group = torch.arange(96) // 64
    plain = (weight / scales[:, group] + zeros[:, group]).round().clamp(0, 7).to(torch.uint8)
    # A value halfway between two codes may round either way.
    assert (codes != plain).float().mean() < 0.005


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x, _ = problem()
    x[:, 5] = 0
    codes, scales, zeros = feedback_codes(weight, Moments(x.T @ x / 400, None, 400), AffineSpec(4, 64))
    assert torch.isfinite(scales).all()
    assert torch.isfinite(zeros).all()
    assert codes.shape == (32, 96)


def test_without_calibration_it_is_the_search_of_hqq():
    weight, _, _ = problem()
    method, spec = get_method("gptq"), AffineSpec(3, 64)
    assert isinstance(method, CalibratedMethod)
    found, wanted = (m.quantize(weight, spec) for m in (method, get_method("hqq")))
    assert all(torch.equal(found[part], tensor) for part, tensor in wanted.items())
