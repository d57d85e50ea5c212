"""Gate and up as one linear with the activation inside: every road against its linear and the activation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from test_linear_affine_sides import DENSE, DOTS, DTYPES, GEMM, QUADS, WIDE, on_modes, prepared
from test_linear_affine_triton import assert_close, problem

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.ops.linear_affine_gated import ACTIVATIONS, activate_halves
from qcompiler.kernels.providers import select_provider
from qcompiler.kernels.triton.linear import affine_sides as sides_launcher
from qcompiler.kernels.triton.linear.affine import linear_affine_triton
from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton
from qcompiler.kernels.tuning.tables import LinearConfig

_ops = torch.ops.qcompiler
GEMV = LinearConfig("gemv", 16, 1, 2, 4, 2)
SPLIT_QUADS = LinearConfig("quads", 4, 4, 2, 1, 1)
SPLIT_GEMM = LinearConfig("gemm", 32, 16, 2, 4, 2)
NARROW = LinearConfig("gemm", 16, 16, 1, 4, 2)
ROADS = (QUADS, DOTS, GEMM, WIDE, DENSE, SPLIT_QUADS, SPLIT_GEMM, NARROW)


def own(gated, linear, activation):
    """Hold the gated result against the activation of the kernel's own linear."""
    wanted = activate_halves(linear.float(), activation).to(gated.dtype)
    assert_close(gated, wanted, wanted.abs() + 1.0)


@on_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", ROADS, ids=lambda c: f"{c.kind}-{c.block_n}-{c.split_k}")
def test_every_road_gives_the_activation_of_its_own_linear(mode, config, dtype):
    rows, columns = (10, 2048) if config.split_k > 1 else (22, 256)
    arguments, _, _ = prepared(4, 64, rows, columns, 1 if config.kind == "quads" else 3, dtype)
    gated = linear_affine_sides_triton(*arguments, config=config, activation="silu")
    own(gated, linear_affine_sides_triton(*arguments, config=config), "silu")


@on_modes
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM], ids=lambda config: config.kind)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_other_activations_without_a_bias(mode, config, activation):
    arguments, _, _ = prepared(4, 64, 14, 256, 1, torch.float16, bias=False)
    gated = linear_affine_sides_triton(*arguments, config=config, activation=activation)
    own(gated, linear_affine_sides_triton(*arguments, config=config), activation)


@on_modes
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM], ids=lambda config: config.kind)
def test_other_widths(mode, bits, config):
    arguments, _, _ = prepared(bits, 32, 14, 128, 1, torch.float16)
    gated = linear_affine_sides_triton(*arguments, config=config, activation="silu")
    own(gated, linear_affine_sides_triton(*arguments, config=config), "silu")


@on_modes
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM, SPLIT_GEMM], ids=lambda c: f"{c.kind}-{c.split_k}")
def test_the_activation_may_have_a_kernel_of_its_own(mode, config, monkeypatch):
    arguments, _, _ = prepared(4, 64, 10, 512, 1, torch.float16)
    inside = linear_affine_sides_triton(*arguments, config=config, activation="silu")
    monkeypatch.setattr(sides_launcher, "ACTIVATION_INSIDE", False)
    outside = linear_affine_sides_triton(*arguments, config=config, activation="silu")
    own(outside, linear_affine_sides_triton(*arguments, config=config), "silu")
    assert_close(inside, outside, outside.float().abs() + 1e-3)


@on_modes
@pytest.mark.parametrize("config", [GEMV, DENSE], ids=lambda config: config.kind)
def test_float32(mode, config):
    arguments, _, _ = problem(4, 64, 38, 512, 2, torch.float32)
    gated = linear_affine_triton(*arguments, config=config, activation="gelu")
    own(gated, linear_affine_triton(*arguments, config=config), "gelu")


def on_cpu(bits, group_size, rows, dtype=torch.float32):
    """Arguments of the canonical linear."""
    arguments, _, _ = problem(bits, group_size, rows, 128, 3, dtype)
    return [item.cpu() if isinstance(item, torch.Tensor) else item for item in arguments]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_op_is_the_linear_and_the_activation(activation):
    arguments = on_cpu(4, 64, 32)
    gate, up = _ops.linear_affine(*arguments).chunk(2, dim=-1)
    if activation == "silu":
        wanted = _ops.silu_mul(gate, up)
    else:
        wanted = _ops.gelu_mul(gate, up, "tanh" if activation == "gelu_tanh" else "none")
    assert torch.equal(_ops.linear_affine_gated(*arguments, activation), wanted)


def test_opcheck():
    arguments = on_cpu(3, 64, 32)
    torch.library.opcheck(_ops.linear_affine_gated.default, (*arguments, "silu"))


@pytest.mark.parametrize(
    ("rows", "activation", "message"),
    [(32, "relu", "unknown activation 'relu'"), (33, "silu", "no two halves")],
)
def test_what_cannot_be_is_refused(rows, activation, message):
    arguments = on_cpu(4, 64, rows)
    with pytest.raises(InvalidInputError, match=message):
        _ops.linear_affine_gated(*arguments, activation)


@pytest.mark.parametrize("group_size", [32, 64, 16])
def test_cpu_providers_run_it_too(group_size):
    """bfloat16 on CPUs: torch's int4 product, or a dense one."""
    x, low, high, scales, zeros, bias, *rest = on_cpu(4, group_size, 32, torch.bfloat16)
    tensors = {"low": low, "high": high, "scales": scales, "zeros": zeros, "bias": bias}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    attributes = dict(zip(("bits", "group_size", "in_features"), rest, strict=True)) | {"activation": "silu"}
    provider = select_provider("linear_affine_gated", attributes, tensors, "cpu", torch.bfloat16)
    assert provider.name == ("cpu-dense" if group_size == 16 else "cpu-int4")
    kept, settings = provider.prepare(tensors, attributes)
    y = provider.op(*provider.bind(x, kept, settings))
    wanted = _ops.linear_affine_gated(x, low, high, scales, zeros, bias, *rest, "silu").float()
    assert (y.float() - wanted).norm() <= 0.02 * wanted.norm()
