"""The op `qcompiler::linear_body_tail`: reference, fake, and the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, BODY_TAIL, BodyTailSpec
from qcompiler.kernels.formats.affine import num_groups
from qcompiler.kernels.formats.body_tail import in_blocks, tail_layout
from qcompiler.kernels.providers import select_provider
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
on_triton = pytest.mark.parametrize("mode", ON_GPU)

GEMV = LinearConfig("gemv", 16, 4, 2, 4, 2)
GEMM = LinearConfig("gemm", 32, 16, 2, 4, 2)
FEW = LinearConfig("gemm", 32, 8, 1, 4, 2)
DENSE = LinearConfig("dense")
ROADS = pytest.mark.parametrize(
    "config", [GEMV, FEW, GEMM, DENSE], ids=lambda config: f"{config.kind}{config.block_m}"
)


def quantized(spec: BodyTailSpec, n: int, k: int) -> dict[str, torch.Tensor]:
    """A random body, and corrections as large as the weights at random columns in every slot."""
    generator = torch.Generator().manual_seed(n + k)
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(n, groups, generator=generator)
    _, slots, block = tail_layout(spec, k)
    score = in_blocks(torch.rand(n, k, generator=generator) + 1, block)
    picks = score.topk(min(slots, block), dim=2).indices
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(2, picks, True).flatten(1)[:, :k]
    body = AFFINE.pack(spec.body, codes, scales, zeros)
    return BODY_TAIL.pack(spec, body, torch.randn(n, k, generator=generator), chosen)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger buffer of NaN (or all-one bits), aligned as allocated ones are."""
    flat = tensor.reshape(-1)
    fill = float("nan") if tensor.is_floating_point() else (255 if tensor.dtype == torch.uint8 else -1)
    buffer = torch.full((flat.numel() + 4096,), fill, dtype=tensor.dtype)
    buffer[2048 : 2048 + flat.numel()] = flat
    return buffer.to(DEVICE)[2048 : 2048 + flat.numel()].view(tensor.shape)


def problem(spec, n, k, m, dtype, *, bias=True):
    """Poisoned arguments, the reference's result, and the size |x|·|w| that errors are measured by."""
    tensors = quantized(spec, n, k)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(dtype)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    op, arguments = BODY_TAIL.op_call(spec, x, tensors, offset, k)
    moved = [poisoned(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    weight = BODY_TAIL.dequantize(spec, tensors, k, torch.float32)
    return moved, op(*arguments).to(DEVICE), (x.float().norm(dim=1)[:, None] * weight.norm(dim=1)).to(DEVICE)


def assert_close(y, wanted, size):
    """The rounding of the output and of each weight to x's dtype, as for the affine kernels."""
    eps = torch.finfo(y.dtype).eps
    assert y.shape == wanted.shape
    assert y.dtype == wanted.dtype
    error = (y.float() - wanted.float()).abs()
    assert bool((error <= eps * (wanted.float().abs() + size) + 1e-6 * size).all()), float(error.max())


def run(arguments, config=None):
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.body_tail import linear_body_tail_triton

    return linear_body_tail_triton(*arguments, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_a_linear_on_the_dequantized_weight(dtype):
    spec, k = BodyTailSpec(3, 32, 0.05), 77
    tensors = quantized(spec, 14, k)
    x, bias = torch.randn(2, 5, k).to(dtype), torch.randn(14).to(dtype)
    op, arguments = BODY_TAIL.op_call(spec, x, tensors, bias, k)
    y = op(*arguments)
    wanted = x.double() @ BODY_TAIL.dequantize(spec, tensors, k, torch.float64).T + bias.double()
    assert y.shape == (2, 5, 14)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_opcheck():
    spec = BodyTailSpec(3, 64, 0.02)
    torch.library.opcheck(*BODY_TAIL.op_call(spec, torch.randn(3, 70), quantized(spec, 10, 70), None, 70))


def test_fake_takes_a_symbolic_token_axis():
    spec = BodyTailSpec(2, 64, 0.02)
    tensors = quantized(spec, 10, 128)

    class Linear(torch.nn.Module):
        def forward(self, x):
            op, arguments = BODY_TAIL.op_call(spec, x, tensors, None, 128)
            return op(*arguments)

    exported = torch.export.export(
        Linear(), (torch.randn(1, 7, 128),), dynamic_shapes=({1: torch.export.Dim("tokens")},)
    )
    x = torch.randn(1, 3, 128)
    torch.testing.assert_close(exported.module()(x), Linear()(x))


def test_wrong_arguments_are_refused_by_name():
    spec = BodyTailSpec(2, 64, 0.02)
    op, arguments = BODY_TAIL.op_call(spec, torch.randn(3, 128), quantized(spec, 10, 128), None, 128)
    x, low, high, scales, zeros, tail, tail_scales, *rest = arguments
    with pytest.raises(InvalidInputError, match="x has 100 features"):
        op(x[:, :100], *arguments[1:])
    with pytest.raises(InvalidInputError, match=r"tail is .*\[1, 10\]"):
        op(x, low, high, scales, zeros, tail[:1], tail_scales, *rest)
    with pytest.raises(InvalidInputError, match="tail_scales are"):
        op(x, low, high, scales, zeros, tail, tail_scales[:9], *rest)
    with pytest.raises(InvalidInputError, match="9-bit tail"):
        op(x, low, high, scales, zeros, tail, tail_scales, None, 2, 64, 0.02, 9, 128)


def test_on_a_cpu_the_weight_is_made_dense_once():
    spec = BodyTailSpec(3, 64, 0.02)
    tensors = quantized(spec, 16, 192)
    x = torch.randn(4, 192)
    op, arguments = BODY_TAIL.op_call(spec, x, tensors, None, 192)
    names = [argument.name for argument in op._schema.arguments]
    attrs = {n: a for n, a in zip(names, arguments, strict=True) if isinstance(a, (int, float))}
    provider = select_provider("linear_body_tail", attrs, tensors, "cpu", torch.float32)
    assert provider.name == "cpu-dense"
    prepared, settings = provider.prepare(tensors, attrs)
    torch.testing.assert_close(provider.op(*provider.bind(x, prepared, settings)), op(*arguments))


@on_triton
@pytest.mark.parametrize("config", [GEMV, GEMM, DENSE], ids=lambda config: config.kind)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_bit_width(mode, bits, config):
    arguments, wanted, size = problem(BodyTailSpec(bits, 64, 0.02), 21, 256, 3, torch.float16)
    assert_close(run(arguments, config), wanted, size)


RAGGED = [
    (BodyTailSpec(3, 0, 0.02), 77),
    (BodyTailSpec(2, 16, 0.005), 600),
    (BodyTailSpec(4, 256, 0.25), 200),
    (BodyTailSpec(3, 32, 0.05, 6), 333),
    (BodyTailSpec(4, 64, 0.01, 4), 31),
    (BodyTailSpec(3, 0, 0.01), 512),  # groups of several tiles
    (BodyTailSpec(4, 256, 0.02), 192),
]


@on_triton
@ROADS
@pytest.mark.parametrize(("spec", "k"), RAGGED)
def test_ragged_widths_groups_and_tails(mode, spec, k, config):
    arguments, wanted, size = problem(spec, 19, k, 2, torch.float16)
    assert_close(run(arguments, config), wanted, size)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 17, 70])
def test_the_chosen_road_for_any_number_of_tokens(mode, tokens, dtype):
    arguments, wanted, size = problem(BodyTailSpec(3, 64, 0.02), 70, 256, tokens, dtype, bias=tokens > 2)
    assert_close(run(arguments), wanted, size)


@on_triton
@pytest.mark.parametrize("kind", ["gemv", "gemm"])
@pytest.mark.parametrize("split", [1, 3])
def test_split_k_gives_the_same_sum(mode, kind, split):
    k = 4096 if kind == "gemv" else 768
    arguments, wanted, size = problem(BodyTailSpec(3, 64, 0.02), 15, k, 2, torch.float16)
    config = LinearConfig(kind, 16, 2 if kind == "gemv" else 16, split, 4, 2)
    first = run(arguments, config)
    assert_close(first, wanted, size)
    assert torch.equal(first, run(arguments, config))


@on_triton
def test_leading_dimensions_strides_and_no_tokens(mode):
    arguments, wanted, size = problem(BodyTailSpec(3, 64, 0.02), 24, 256, 6, torch.float16)
    x, *rest = arguments
    assert_close(run([x.view(2, 3, 256), *rest]).view(6, 24), wanted, size)
    wide = torch.full((6, 259), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 3:] = x
    for config in (GEMM, LinearConfig("gemv", 16, 8, 1, 4, 2)):
        assert_close(run([wide[:, 3:], *rest], config), wanted, size)
    assert run([x[:0], *rest]).shape == (0, 24)


@on_triton
@pytest.mark.parametrize("tokens", [1, 16])
def test_cuda_graph_replays(mode, tokens):
    if mode != "compiled":
        pytest.skip("graphs are a CUDA thing")
    arguments, wanted, size = problem(BodyTailSpec(3, 64, 0.005), 64, 4096, tokens, torch.bfloat16)
    op = torch.ops.qcompiler.linear_body_tail.default
    op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*arguments)
    y.fill_(float("nan"))
    graph.replay()
    assert_close(y, wanted, size)
