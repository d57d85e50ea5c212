"""Our published-solver hqq and the affine format against torchao, which carries that solver too.

What agrees exactly, in fp32: codes, scales and zeros for every width and group, wherever no error of a weight
exceeds 0.17, below which the solver shrinks nothing (any ordinary weight). Beyond, torchao follows an
earlier form that lets β grow by 1 % a round; with that held at 0 % it agrees exactly there too.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.methods.base import get_method

SOLVER = {"lp_norm": 0.7, "beta": 1e1, "kappa": 1.0, "iters": 20, "early_stop": True}


@pytest.fixture(scope="module")
def primitives():
    return pytest.importorskip("torchao.quantization.quant_primitives")


def weight(size: float, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(48, 512, generator=torch.Generator().manual_seed(seed))


def solved(matrix, bits, group):
    return get_method("hqq").solve(matrix, AffineSpec(bits, group), {"solver": "reference"})


def torchaos(primitives, matrix, bits, group, **options):
    """Codes [N, K], scales and zeros [N, groups], as the hqq package would give them."""
    return primitives._choose_qparams_and_quantize_affine_hqq(
        matrix, nbits=bits, group_size=group, compute_dtype=torch.float32, device="cpu", **options
    )[:3]


@pytest.mark.parametrize("group", [16, 64, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_reference_solver_equals_torchaos_on_ordinary_weights(primitives, bits, group):
    for size in (1e-3, 0.02, 0.1):
        ours, theirs = (
            solved(weight(size), bits, group),
            torchaos(primitives, weight(size), bits, group, raw_output=True),
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_where_the_shrinkage_acts_only_torchaos_growing_beta_is_different(primitives, bits):
    large = weight(1.0)
    held = partial(primitives.optimize_weights_proximal_legacy, opt_params=SOLVER)
    theirs = torchaos(primitives, large, bits, 64, raw_output=True, optimize_weights=held)
    ours = solved(large, bits, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    growing = torchaos(primitives, large, bits, 64, raw_output=True)
    assert torch.equal(ours.scales, growing[1])
    assert not torch.equal(ours.zeros, growing[2])
    assert (ours.codes != growing[0]).float().mean() < 0.02


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_stored_weight_is_what_torchao_dequantizes(primitives, bits):
    """torchao keeps the zero point in the weight's units: w = (q − 2^(b−1))·s + z."""
    matrix = weight(0.02)
    spec = AffineSpec(bits, 64, torch.float32)
    ours = AFFINE.dequantize(spec, AFFINE.pack(spec, *solved(matrix, bits, 64)), 512, torch.float32)
    codes, scales, zeros = torchaos(primitives, matrix, bits, 64)
    theirs = primitives._dequantize_affine_tinygemm(
        codes, (1, 64), scales.reshape(48, 8), zeros.reshape(48, 8), torch.uint8, 0, 2**bits - 1,
        output_dtype=torch.float32,
    )  # fmt: skip
    # The same line written with its zero in other units: equal but for the rounding of a product.
    assert torch.allclose(ours, theirs, rtol=0, atol=2**-20 * float(matrix.abs().max()) * 2**bits)
