"""A 16-bit codebook rounded to int8 slices: what is rounded, who uses it, and the kernel on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec
from qcompiler.kernels.ops.linear_additive_slices import LINEAR_ADDITIVE_SLICES, pack_slices
from qcompiler.kernels.providers import AdditiveSlices
from qcompiler.kernels.tuning.tables import LinearConfig

SPEC = AdditiveSpec(1, 16)


def quantized(n: int, k: int) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 65536, (n, -(-k // 8), 1))
    return ADDITIVE.pack(SPEC, codes, torch.randn(1, 65536, 8), torch.rand(n) + 0.5)


def test_tables_hold_the_rounded_codebook_exactly():
    books = torch.randn(1, 1, 65536, 8).half()
    packed = pack_slices(books)
    slices = packed["tables"].float() * packed["table_scale"]
    joined = slices.transpose(0, 1).reshape(1, 1, 65536, 8)
    assert torch.equal(packed["codebooks"].float(), joined)
    # Steps of 1/127 of the largest of half a million normal values, about 5: 0.011 of their size.
    assert (joined - books.float()).norm() / books.float().norm() < 0.012


def test_one_large_codeword_does_not_take_all_steps():
    books = torch.randn(1, 1, 65536, 8).half()
    books[0, 0, 7] = 60
    packed = pack_slices(books)
    rest = torch.arange(65536) != 7
    error = (packed["codebooks"] - books).float()[0, 0, rest].norm() / books.float()[0, 0, rest].norm()
    assert error < 60 / 127 / 12**0.5


def test_a_codebook_of_zeros_stays():
    packed = pack_slices(torch.zeros(1, 1, 65536, 8, dtype=torch.float16))
    assert not packed["codebooks"].any()
    assert not packed["tables"].any()


def test_other_codebooks_are_refused():
    with pytest.raises(InvalidInputError, match="one float16 codebook of 65536"):
        pack_slices(torch.zeros(1, 2, 256, 8, dtype=torch.float16))


def test_provider_prepares_what_the_op_takes():
    tensors = quantized(10, 72) | {"bias": torch.randn(10)}
    attrs = {"bits": 16, "in_features": 72}
    provider = AdditiveSlices(torch.device("cuda"), torch.bfloat16)
    assert provider.supports(attrs, tensors) is None
    assert "runs on GPUs" in AdditiveSlices(torch.device("cpu"), torch.bfloat16).supports(attrs, tensors)
    assert "round" in AdditiveSlices(torch.device("cuda"), torch.float32).supports(attrs, tensors)
    x = torch.randn(2, 3, 72)
    arguments = provider.bind(x, *provider.prepare(tensors, attrs))
    torch.library.opcheck(LINEAR_ADDITIVE_SLICES.overload, arguments)
    y = provider.op(*arguments)
    op, exact = ADDITIVE.op_call(SPEC, x, tensors, tensors["bias"], 72)
    wanted = op(*exact)
    # The rounding of the codebook, see above.
    assert (y - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_inputs_are_dealt_out_to_the_slices():
    pytest.importorskip("triton")
    from qcompiler.kernels.triton.linear.additive_slices import slice_inputs

    tokens, k, groups = 3, 75, 64
    x = torch.full((tokens, k + 5), float("nan"))[:, :k]
    x.copy_(torch.randn(tokens, k))
    sliced = torch.full((4, tokens, groups, 2), float("nan"))
    slice_inputs[(4, tokens)](x, sliced, tokens, k, groups, x.stride(0), BK=128)
    whole = torch.nn.functional.pad(x, (0, 8 * groups - k))
    assert torch.equal(sliced, whole.view(tokens, groups, 4, 2).permute(2, 0, 1, 3))


def on_gpu(n, k, tokens, dtype):
    """A provider and its arguments; columns past K are NaN in memory."""
    tensors = {part: t.cuda() for part, t in quantized(n, k).items()}
    packed = tensors | pack_slices(tensors["codebooks"]) | {"bias": torch.randn(n, device="cuda").to(dtype)}
    x = torch.full((tokens, k + 13), float("nan"), dtype=dtype, device="cuda")[:, :k]
    x.copy_(torch.randn(tokens, k))
    provider = AdditiveSlices(torch.device("cuda"), dtype)
    return provider, provider.bind(x, packed, {"bits": 16, "in_features": k})


def check(found, arguments, dtype):
    exact = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    wanted = LINEAR_ADDITIVE_SLICES.reference(exact[0].double(), *exact[1:])
    # The other roads round the weight to x's dtype.
    assert (found.cpu().double() - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("n", "k", "tokens", "dtype", "shared"),
    [
        (37, 300, 1, torch.bfloat16, True),
        (128, 512, 3, torch.float16, True),
        (600, 1000, 9, torch.bfloat16, True),
        (1000, 776, 32, torch.float16, True),
        (37, 300, 1, torch.bfloat16, False),
        (200, 1000, 9, torch.float16, False),
    ],
)
def test_slices_in_shared_memory_by_default_or_not(n, k, tokens, dtype, shared, monkeypatch):
    from qcompiler.kernels.triton.linear import additive as launcher

    monkeypatch.setattr(launcher, "SHARED_BY_DEFAULT", shared)
    provider, arguments = on_gpu(n, k, tokens, dtype)
    check(provider.op(*arguments), arguments, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("kind", "split"), [("shared", 1), ("shared", 5), ("gemv", 1), ("gemm", 1), ("dense", 1)]
)
def test_every_road_gives_what_the_reference_gives(kind, split):
    from qcompiler.kernels.triton.linear.additive import linear_additive_slices_triton

    _, arguments = on_gpu(300, 2100, 4, torch.bfloat16)
    config = LinearConfig(kind, 128, 8, split, 8, 1)
    check(linear_additive_slices_triton(*arguments, config=config), arguments, torch.bfloat16)
