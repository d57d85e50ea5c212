"""`silu_mul` and `gelu_mul` against the two ops they replace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import on_triton, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError

SILU = torch.ops.qcompiler.silu_mul.default
GELU = torch.ops.qcompiler.gelu_mul.default
FORMULAS = {
    "silu": (SILU, (), F.silu),
    "gelu": (GELU, ("none",), F.gelu),
    "gelu-tanh": (GELU, ("tanh",), lambda x: F.gelu(x, approximate="tanh")),
}


def case(shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g) * 4, torch.randn(shape, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_reference_is_the_pair_it_replaces_bit_for_bit(name, dtype):
    op, extra, activation = FORMULAS[name]
    gate, up = (t.to(dtype) for t in case((3, 50)))
    assert torch.equal(op(gate, up, *extra), activation(gate) * up)


def test_an_unknown_approximation_is_refused():
    with pytest.raises(InvalidInputError, match="'sigmoid'"):
        GELU(*case((2, 2)), "sigmoid")


@pytest.mark.parametrize("name", FORMULAS)
def test_opcheck(name):
    op, extra, _ = FORMULAS[name]
    fused = torch.randn(3, 20)
    torch.library.opcheck(op, (fused[:, :10], fused[:, 10:], *extra))


@on_triton
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (2, 3, 1100)])
def test_kernel_agrees(shape, name, target):
    from qcompiler.kernels.triton import activation as kernels

    op, extra, activation = FORMULAS[name]
    gate, up = to_target(target, *case(shape))
    function = kernels.silu_mul if op is SILU else kernels.gelu_mul
    wanted = activation(gate.cpu().double()) * up.cpu().double()
    assert_close(function(poisoned(gate), poisoned(up), *extra), wanted)


@on_triton
def test_kernel_at_the_ends_of_the_range(target):
    from qcompiler.kernels.triton import activation as kernels

    gate, up = to_target(target, torch.tensor([-6e4, -100.0, 0.0, 100.0, 6e4]), torch.ones(5))
    wanted = torch.tensor([0.0, 0.0, 0.0, 100.0, 6e4]).to(gate.dtype)
    assert_close(kernels.silu_mul(gate, up), wanted)
    assert_close(kernels.gelu_mul(gate, up, "tanh"), wanted)
    assert_close(kernels.gelu_mul(gate, up, "none"), wanted)
