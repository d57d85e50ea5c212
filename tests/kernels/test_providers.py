"""Providers: chosen by case, equal to the canonical op within what their storage rounds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from qcompiler.kernels import providers
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import BITS, num_groups
from qcompiler.kernels.providers import select_provider

BF16 = torch.finfo(torch.bfloat16).eps


def case(bits, group_size, n, k, bias=True):
    generator = torch.Generator().manual_seed(bits * 1000 + k)
    spec = AffineSpec(bits, group_size)
    groups = num_groups(group_size, k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5) / 2**bits
    zeros = 2 ** (bits - 1) + torch.randn(n, groups, generator=generator)
    tensors = AFFINE.pack(spec, codes, scales, zeros)
    if bias:
        tensors["bias"] = torch.randn(n, generator=generator).to(torch.bfloat16)
    return tensors, {"bits": bits, "group_size": group_size, "in_features": k}


@pytest.mark.parametrize(
    ("bits", "group_size", "n", "k", "dtype", "name"),
    [
        (4, 64, 32, 256, torch.bfloat16, "cpu-int4"),
        (3, 32, 16, 96, torch.bfloat16, "cpu-int4"),
        (2, 256, 16, 512, torch.bfloat16, "cpu-int4"),
        (4, 0, 16, 96, torch.bfloat16, "cpu-int4"),
        (4, 16, 16, 96, torch.bfloat16, "cpu-dense"),
        (4, 64, 24, 256, torch.bfloat16, "cpu-dense"),
        (4, 64, 32, 100, torch.bfloat16, "cpu-dense"),
        (4, 64, 32, 256, torch.float32, "cpu-dense"),
        (4, 64, 32, 256, torch.float16, "cpu-dense"),
        (8, 0, 17, 96, torch.bfloat16, "cpu-int8"),
        (5, 0, 17, 128, torch.bfloat16, "cpu-int8"),
        (8, 0, 17, 100, torch.bfloat16, "cpu-dense"),
        (8, 64, 16, 128, torch.bfloat16, "cpu-dense"),
    ],
)
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_cpu_provider_equals_the_canonical_op(bits, group_size, n, k, dtype, name, lean, tokens):
    tensors, attrs = case(bits, group_size, n, k)
    provider = select_provider("linear_affine", attrs, tensors, "cpu", dtype, lean=lean)
    assert provider.name == name
    x = torch.randn(1, tokens, k).to(dtype)
    y = provider.op(*provider.bind(x, *provider.prepare(tensors, attrs)))

    op, arguments = AFFINE.op_call(AffineSpec(bits, group_size), x.float(), tensors, tensors["bias"], k)
    wanted = op(*arguments)
    assert y.shape == wanted.shape
    assert y.dtype == dtype
    # What may be rounded before the sum: the scale and the offset, or the dense weight, to x's dtype (codes
    # are exact). Each is at most 2^bits·scale in size and off by half a unit in the last place, eps/2.
    eps = torch.finfo(dtype).eps
    size = x.float().abs().sum(-1, keepdim=True) * (2**bits * tensors["scales"].float().amax())
    # The output is rounded up to twice (kernel, bias).
    bound = eps * size + 2 * eps * (wanted.abs() + tensors["bias"].float().abs()) + 1e-5
    if name == "cpu-int8":
        bound = bound + eps * size  # the kernel's own result is rounded before offset·Σx joins
    assert bool(((y.float() - wanted).abs() <= bound).all())
    relative = (y.float() - wanted).norm() / wanted.norm()
    assert relative < (1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("bits", BITS)
def test_dense_float32_is_the_reference(bits):
    tensors, attrs = case(bits, 64, 20, 130, bias=False)
    provider = select_provider("linear_affine", attrs, tensors, "cpu", torch.float32)
    x = torch.randn(5, 130)
    op, arguments = AFFINE.op_call(AffineSpec(bits, 64), x, tensors, None, 130)
    torch.testing.assert_close(
        provider.op(*provider.bind(x, *provider.prepare(tensors, attrs))),
        op(*arguments),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 0), (6, 64)])
def test_opcheck(bits, group_size):
    tensors, attrs = case(bits, group_size, 16, 128)
    for lean in (False, True):
        provider = select_provider("linear_affine", attrs, tensors, "cpu", torch.bfloat16, lean=lean)
        x = torch.randn(2, 128).to(torch.bfloat16)
        torch.library.opcheck(provider.op, provider.bind(x, *provider.prepare(tensors, attrs)))


def test_lean_keeps_no_dense_copy():
    tensors, attrs = case(4, 64, 64, 1024)
    for lean, most in ((True, 4.6), (False, 20.6)):
        provider = select_provider("linear_affine", attrs, tensors, "cpu", torch.bfloat16, lean=lean)
        prepared, _ = provider.prepare(tensors, attrs)
        stored = sum(tensor.nbytes for name, tensor in prepared.items() if name != "bias")
        assert 8 * stored / (64 * 1024) <= most


def test_cuda_and_other_ops_keep_the_canonical_op():
    tensors, attrs = case(4, 64, 32, 256)
    # 16-bit activations take prepared scales there; float32 must not be rounded.
    assert select_provider("linear_affine", attrs, tensors, "cuda", torch.bfloat16).name == "sides"
    provider = select_provider("linear_affine", attrs, tensors, "cuda", torch.float32)
    assert provider.name == "canonical"
    assert provider.op is torch.ops.qcompiler.linear_affine.default
    prepared, kept = provider.prepare(tensors, attrs)
    assert kept == attrs
    assert prepared["low"] is tensors["low"]
    bound = provider.bind("x", prepared, kept)
    assert bound[0] == "x"
    assert bound[2] is None  # no high plane at 4 bits
    assert bound[-3:] == (4, 64, 256)


def test_an_unknown_op_is_refused():
    with pytest.raises(InvalidInputError, match="no op qcompiler::linear_magic"):
        select_provider("linear_magic", {}, {}, "cpu", torch.float32)


def test_a_provider_says_why_not():
    tensors, attrs = case(4, 64, 32, 256)
    from qcompiler.kernels.providers import AffineCpuInt4

    reason = AffineCpuInt4(torch.device("cpu"), torch.float32).supports(attrs, tensors)
    assert reason == "is fast for bfloat16 only, not torch.float32"


def test_every_provider_that_an_op_names_exists():
    """They are imported at their first call, on a device that tests may not have."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = Path(providers.__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    targets = re.findall(r'"(qcompiler\.kernels\.[\w.]+):(\w+)"', text)
    assert len(targets) > 20
    for module, function in targets:
        assert callable(getattr(importlib.import_module(module), function)), f"{module}:{function}"
