"""Triton providers of linear_affine against the reference: interpreted, or compiled on a CUDA device.

Inputs lie inside larger buffers full of NaN, so that a read past an edge that
reaches the result shows; outputs are compared over every element.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import BITS, num_groups
from qcompiler.kernels.triton.linear import affine as launcher
from qcompiler.kernels.tuning.tables import LinearConfig

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ON_GPU = [
    pytest.param("interpreter", marks=pytest.mark.skipif(CUDA, reason="a CUDA device compiles instead")),
    pytest.param(
        "compiled",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="compiled kernels need a CUDA device")],
    ),
]
pytestmark = pytest.mark.parametrize("mode", ON_GPU)

GEMV = LinearConfig("gemv", 16, 4, 2, 4, 2)
GEMM = LinearConfig("gemm", 64, 16, 2, 4, 2)
DENSE = LinearConfig("dense")


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger buffer of NaN (or all-one bits), aligned as allocated ones are."""
    flat = tensor.reshape(-1)
    fill = float("nan") if tensor.is_floating_point() else (255 if tensor.dtype == torch.uint8 else -1)
    buffer = torch.full((flat.numel() + 4096,), fill, dtype=tensor.dtype)
    buffer[2048 : 2048 + flat.numel()] = flat
    return buffer.to(DEVICE)[2048 : 2048 + flat.numel()].view(tensor.shape)


def problem(bits, group_size, n, k, m, dtype, *, scale_dtype=torch.float16, bias=True):
    generator = torch.Generator().manual_seed(bits + group_size + k + m)
    spec = AffineSpec(bits, group_size, scale_dtype)
    groups = num_groups(group_size, k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5) / 2**bits
    zeros = 2 ** (bits - 1) + torch.randn(n, groups, generator=generator)
    tensors = AFFINE.pack(spec, codes, scales, zeros)
    x = torch.randn(m, k, generator=generator).to(dtype)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    op, arguments = AFFINE.op_call(spec, x, tensors, offset, k)
    moved = [poisoned(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    weight = AFFINE.dequantize(spec, tensors, k, torch.float32)
    return moved, op(*arguments).to(DEVICE), (x.float().norm(dim=1)[:, None] * weight.norm(dim=1)).to(DEVICE)


def assert_close(y, wanted, size):
    """Off by the rounding of the output and, in the fused GEMM, of each weight and scale to x's dtype.

    Those roundings are independent between groups, so they add up like a random walk: eps·|x|·|w| bounds
    them with a margin of about two. The interpreter truncates float32 to bfloat16 where a GPU rounds, hence
    a whole unit of the output instead of half.
    """
    eps = torch.finfo(y.dtype).eps
    assert y.shape == wanted.shape
    assert y.dtype == wanted.dtype
    error = (y.float() - wanted.float()).abs()
    assert bool((error <= eps * (wanted.float().abs() + size) + 1e-6 * size).all()), float(error.max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("config", [GEMV, GEMM, DENSE], ids=lambda config: config.kind)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_bit_width_and_dtype(mode, bits, config, dtype):
    if config.kind == "gemm" and dtype == torch.float32:
        pytest.skip("float32 activations never take the tensor cores")
    arguments, wanted, size = problem(bits, 64, 37, 320, 3, dtype)
    assert_close(launcher.linear_affine_triton(*arguments, config=config), wanted, size)


@pytest.mark.parametrize("config", [GEMV, GEMM, DENSE], ids=lambda config: config.kind)
@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("bits", "k"), [(4, 384), (3, 77), (8, 31)])
def test_every_group_size_on_ragged_widths(mode, bits, group_size, k, config):
    arguments, wanted, size = problem(bits, group_size, 19, k, 2, torch.float16)
    assert_close(launcher.linear_affine_triton(*arguments, config=config), wanted, size)


@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chosen_road_for_any_number_of_tokens(mode, tokens, bias):
    arguments, wanted, size = problem(4, 64, 70, 256, tokens, torch.float16, bias=bias)
    assert_close(launcher.linear_affine_triton(*arguments), wanted, size)


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_float32_keeps_float32_precision(mode, tokens):
    arguments, wanted, size = problem(4, 64, 40, 512, tokens, torch.float32, scale_dtype=torch.float32)
    y = launcher.linear_affine_triton(*arguments)
    # float32 sums of 512 terms that carry a bias of 128 per code.
    assert bool(((y - wanted).abs() <= 2e-5 * size).all())


@pytest.mark.parametrize("config", [GEMV, GEMM], ids=lambda config: config.kind)
@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_split_k_gives_the_same_sum(mode, config, split):
    arguments, wanted, size = problem(4, 64, 20, 1024, 2, torch.float16)
    config = LinearConfig(config.kind, config.block_n, config.block_m, split, 4, 2)
    first = launcher.linear_affine_triton(*arguments, config=config)
    assert_close(first, wanted, size)
    assert torch.equal(first, launcher.linear_affine_triton(*arguments, config=config))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "k"), [(64, 320), (16, 100), (0, 77)])
def test_dequantize_equals_the_format(mode, bits, group_size, k):
    arguments, _, _ = problem(bits, group_size, 33, k, 1, torch.float32)
    _, low, high, scales, zeros, _, *rest = arguments
    weight = launcher.dequantize_triton(low, high, scales, zeros, *rest, torch.float32)
    parts = {"low": low, "high": high, "scales": scales, "zeros": zeros}
    wanted = AFFINE.dequantize(AffineSpec(bits, group_size), parts, k, torch.float32)
    # Same float32 operations in the same order; a GPU may fuse nothing here, as no sum follows the product.
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gemv", "gemm"])
def test_outputs_are_written_everywhere(mode, kind, monkeypatch):
    arguments, wanted, size = problem(4, 64, 37, 512, 5, torch.float16)
    filled = []
    new_empty = torch.Tensor.new_empty

    def nan_filled(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        if made.is_floating_point() and made.numel():
            filled.append(made.fill_(float("nan")).shape)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    config = LinearConfig(kind, 16, 16 if kind == "gemm" else 8, 2, 4, 2)
    y = launcher.linear_affine_triton(*arguments, config=config)
    monkeypatch.undo()
    assert (5, 37) in filled
    assert (2, 5, 37) in filled
    assert_close(y, wanted, size)


def test_leading_dimensions_strides_and_no_tokens(mode):
    arguments, wanted, size = problem(4, 64, 24, 128, 6, torch.float16)
    x = arguments[0]
    y = launcher.linear_affine_triton(x.view(2, 3, 128), *arguments[1:])
    assert_close(y.view(6, 24), wanted, size)
    wide = torch.full((6, 131), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 3:] = x
    for config in (GEMM, LinearConfig("gemv", 16, 8, 1, 4, 2)):
        y = launcher.linear_affine_triton(wide[:, 3:], *arguments[1:], config=config)
        assert_close(y, wanted, size)
    assert launcher.linear_affine_triton(x[:0], *arguments[1:]).shape == (0, 24)


@pytest.mark.parametrize("tokens", [1, 16])
def test_cuda_graph_replays(mode, tokens):
    if mode != "compiled":
        pytest.skip("graphs are a CUDA thing")
    arguments, wanted, size = problem(4, 64, 64, 4096, tokens, torch.bfloat16)
    op = torch.ops.qcompiler.linear_affine.default
    op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*arguments)
    y.fill_(float("nan"))
    graph.replay()
    assert_close(y, wanted, size)
