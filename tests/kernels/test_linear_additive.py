"""The op `qcompiler::linear_additive`: reference, fake, and the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec
from qcompiler.kernels.formats.additive import num_groups
from qcompiler.kernels.tuning.tables import LinearConfig

SCHEMES = ["2x8", "1x16", "1x12", "3x8", "2x5"]


def quantized(spec: AdditiveSpec, rows: tuple[int, ...], k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights side by side, each with codebooks of its own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for n in rows:
        shape = (n, num_groups(spec.group_size, k), spec.codebooks)
        codes = torch.randint(0, spec.codewords, shape, generator=generator)
        books = torch.randn(spec.codebooks, spec.codewords, spec.group_size, generator=generator)
        parts.append(ADDITIVE.pack(spec, codes, books, torch.rand(n, generator=generator) + 0.5))
    return ADDITIVE.concat(spec, parts)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_a_linear_on_the_dequantized_weight(scheme, dtype):
    spec, k = AdditiveSpec.parse(scheme), 75
    tensors = quantized(spec, (11, 3), k)
    x, bias = torch.randn(2, 5, k).to(dtype), torch.randn(14).to(dtype)
    op, arguments = ADDITIVE.op_call(spec, x, tensors, bias, k)
    y = op(*arguments)
    wanted = x.double() @ ADDITIVE.dequantize(spec, tensors, k, torch.float64).T + bias.double()
    assert y.shape == (2, 5, 14)
    assert y.dtype == dtype
    # One rounding to the output dtype, after float32 sums of 75 terms.
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("scheme", ["2x8", "1x12", "1x16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(scheme, with_bias):
    spec = AdditiveSpec.parse(scheme)
    bias = torch.randn(10) if with_bias else None
    op, arguments = ADDITIVE.op_call(spec, torch.randn(3, 70), quantized(spec, (10,), 70), bias, 70)
    torch.library.opcheck(op, arguments)


def test_fake_takes_a_symbolic_token_axis():
    spec = AdditiveSpec(2, 8)
    tensors = quantized(spec, (10,), 128)

    class Linear(torch.nn.Module):
        def forward(self, x):
            op, arguments = ADDITIVE.op_call(spec, x, tensors, None, 128)
            return op(*arguments)

    exported = torch.export.export(
        Linear(), (torch.randn(1, 7, 128),), dynamic_shapes=({1: torch.export.Dim("tokens")},)
    )
    x = torch.randn(1, 3, 128)
    torch.testing.assert_close(exported.module()(x), Linear()(x))


def test_wrong_arguments_are_refused_by_name():
    spec = AdditiveSpec(2, 8)
    op, arguments = ADDITIVE.op_call(spec, torch.randn(3, 100), quantized(spec, (10,), 128), None, 128)
    with pytest.raises(InvalidInputError, match="x has 100 features"):
        op(*arguments)
    _, *rest = arguments
    with pytest.raises(InvalidInputError, match="with 12-bit codes"):
        op(torch.randn(3, 128), *rest[:-2], 12, 128)
    with pytest.raises(InvalidInputError, match="codes are"):
        op(torch.randn(3, 256), *rest[:-2], 8, 256)


@pytest.mark.parametrize(
    ("scheme", "group_size"), [("2x8", 8), ("1x16", 8), ("1x12", 8), ("3x8", 4), ("2x5", 16), ("2x9", 8)]
)
@pytest.mark.parametrize("tokens", [1, 3, 5, 70])
def test_kernels_give_what_the_reference_gives(scheme, group_size, tokens):
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, k = AdditiveSpec.parse(scheme, group_size), 300
    tensors = {part: t.to(device) for part, t in quantized(spec, (37, 5, 30), k).items()}
    # Columns past K are NaN in memory: a kernel that reads them gives NaN.
    x = torch.full((tokens, k + 13), float("nan"), device=device)[:, :k]
    x.copy_(torch.randn(tokens, k))
    bias = torch.randn(72, device=device)
    for extra in (None, bias):
        op, arguments = ADDITIVE.op_call(spec, x, tensors, extra, k)
        found = linear_additive_triton(*arguments)
        wanted = op(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
        # Sums of 300 products in another order.
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 17])
def test_kernels_take_half_precision(dtype, tokens):
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = AdditiveSpec(2, 8)
    tensors = {part: t.to(device) for part, t in quantized(spec, (40,), 72).items()}
    x = torch.randn(1, tokens, 72).to(device, dtype)
    _, arguments = ADDITIVE.op_call(spec, x, tensors, None, 72)
    found = linear_additive_triton(*arguments)
    dense = ADDITIVE.dequantize(spec, tensors, 72, torch.float32)
    assert found.dtype == dtype
    # The tensor cores take the weight rounded to x's dtype.
    error = (found.float() - x.float() @ dense.T).norm() / (x.float() @ dense.T).norm()
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["gemv", "gemm", "dense"])
@pytest.mark.parametrize("scheme", ["2x8", "1x16"])
def test_every_road_gives_what_the_reference_gives(kind, scheme):
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec, k = AdditiveSpec.parse(scheme), 76
    tensors = {part: t.to(device) for part, t in quantized(spec, (19, 14), k).items()}
    x, bias = torch.randn(3, k, device=device), torch.randn(33, device=device)
    op, arguments = ADDITIVE.op_call(spec, x, tensors, bias, k)
    found = linear_additive_triton(*arguments, config=LinearConfig(kind))
    wanted = op(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=2e-4)


def test_roads_that_do_not_exist_are_refused():
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    spec = AdditiveSpec(2, 8)
    _, arguments = ADDITIVE.op_call(spec, torch.randn(3, 72), quantized(spec, (40,), 72), None, 72)
    with pytest.raises(InvalidInputError, match="shared table"):  # float32 is never rounded
        linear_additive_triton(*arguments, config=LinearConfig("shared", 128, 8, 1, 4, 1))
    with pytest.raises(InvalidInputError, match="no kernel of kind 'wide'"):
        linear_additive_triton(*arguments, config=LinearConfig("wide"))


def test_heuristic_leaves_no_program_without_work():
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear import additive as launcher

    kinds = [launcher.heuristic(m, 4096, 14336, None, 132).kind for m in (1, 4, 5, 128, 129)]
    assert kinds == ["gemv", "gemv", "gemm", "gemm", "dense"]
    assert launcher.heuristic(33, 4096, 14336, (8, 2), 132).kind == "gemm"
    for n, k in ((4096, 14336), (28672, 8192), (1000, 75), (1, 8)):
        for shared in ((8, 1), (8, 2), (8, 3), (8, 4), (12, 1), (12, 2)):
            config = launcher.heuristic(1, n, k, shared, 132)
            assert config.kind == "shared"
            assert config.split_k == 1 or config.split_k * 16 * 8 < k
        config = launcher.slices_config(1, n, k, 132)
        assert config.split_k == 1 or config.split_k * 64 * 8 < k


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("scheme", "n", "k", "tokens", "dtype", "shared"),
    [
        ("2x8", 37, 320, 1, torch.bfloat16, True),
        ("2x8", 128, 512, 3, torch.float16, True),
        ("2x8", 200, 1000, 9, torch.bfloat16, True),
        ("2x8", 9, 75, 17, torch.float16, True),
        ("1x8", 130, 776, 1, torch.bfloat16, True),
        ("3x8", 130, 800, 2, torch.bfloat16, True),
        ("3x8", 130, 776, 12, torch.float16, True),
        ("4x8", 130, 776, 1, torch.bfloat16, True),
        ("1x12", 130, 768, 3, torch.bfloat16, True),
        ("2x12", 300, 800, 1, torch.float16, True),
        ("2x8", 37, 320, 1, torch.bfloat16, False),
        ("2x8", 200, 1000, 9, torch.bfloat16, False),
    ],
)
def test_codebooks_in_shared_memory_by_default_or_not(scheme, n, k, tokens, dtype, shared, monkeypatch):
    from qcompiler.kernels.triton.linear import additive as launcher

    monkeypatch.setattr(launcher, "SHARED_BY_DEFAULT", shared)
    spec = AdditiveSpec.parse(scheme)
    tensors = {part: t.cuda() for part, t in quantized(spec, (n,), k).items()}
    # Columns past K are NaN in memory: a kernel that reads them gives NaN.
    x = torch.full((tokens, k + 13), float("nan"), dtype=dtype, device="cuda")[:, :k]
    x.copy_(torch.randn(tokens, k))
    bias = torch.randn(n, device="cuda").to(dtype)
    _, arguments = ADDITIVE.op_call(spec, x, tensors, bias, k)
    found = launcher.linear_additive_triton(*arguments).double()
    wanted = x.double() @ ADDITIVE.dequantize(spec, tensors, k, torch.float64).T + bias.double()
    # The tensor cores take codewords, or their sum, rounded to x's dtype.
    assert (found - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps


def test_sizes_that_do_not_go_together_are_refused(monkeypatch):
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear import additive as launcher

    monkeypatch.setattr(launcher, "COMPILED", True)
    monkeypatch.setattr(launcher, "books_fit", lambda *_: True)
    spec = AdditiveSpec(2, 8)
    _, arguments = ADDITIVE.op_call(spec, torch.randn(3, 72), quantized(spec, (40,), 72), None, 72)
    for block_n in (64, 384):
        with pytest.raises(InvalidInputError, match="8 warps take powers of two of rows from 128 on"):
            launcher.linear_additive_triton(*arguments, config=LinearConfig("shared", block_n, 8, 1, 8, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("block_n", "warps", "split"), [(64, 4, 3), (128, 4, 64), (128, 8, 1), (256, 8, 2)])
def test_shared_tables_with_any_sizes(block_n, warps, split):
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    spec, k = AdditiveSpec(2, 8), 1304
    tensors = {part: t.cuda() for part, t in quantized(spec, (300,), k).items()}
    x = torch.randn(5, k, device="cuda").half()
    _, arguments = ADDITIVE.op_call(spec, x, tensors, None, k)
    config = LinearConfig("shared", block_n, 8, split, warps, 1)
    found = linear_additive_triton(*arguments, config=config).double()
    wanted = x.double() @ ADDITIVE.dequantize(spec, tensors, k, torch.float64).T
    assert (found - wanted).norm() / wanted.norm() < torch.finfo(torch.float16).eps
    assert torch.equal(found, linear_additive_triton(*arguments, config=config).double())


def test_no_tokens_give_no_rows():
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive import linear_additive_triton

    spec = AdditiveSpec(2, 8)
    _, arguments = ADDITIVE.op_call(spec, torch.randn(2, 0, 72), quantized(spec, (40,), 72), None, 72)
    assert linear_additive_triton(*arguments).shape == (2, 0, 40)
