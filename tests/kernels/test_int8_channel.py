"""The int8_channel format and its two ops: weight-only, and int8 on both sides with outlier columns."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import INT8_CHANNEL, Int8ChannelSpec, get_format
from qcompiler.kernels.ops.linear_int8 import linear_int8_reference
from qcompiler.kernels.ops.linear_llm_int8 import linear_llm_int8_reference, quantize_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stored(n: int, k: int, spec: Int8ChannelSpec | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return INT8_CHANNEL.pack(
        spec or Int8ChannelSpec(), codes, torch.rand(n, generator=generator) / 500 + 1e-4
    )


def activations(tokens: int, k: int, outliers: dict[int, float] | None = None) -> torch.Tensor:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    for column, value in (outliers or {}).items():
        x[column % tokens, column] = value
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("k", [112, 100])
def test_weight_only_is_a_linear_on_the_dequantized_weight(dtype, tokens, k):
    spec, tensors = Int8ChannelSpec(), stored(24, k)
    x, bias = activations(tokens, k).to(dtype), torch.randn(24).to(dtype)
    op, arguments = INT8_CHANNEL.op_call(spec, x, tensors, bias, k)
    y = op(*arguments)
    wanted = x.double() @ INT8_CHANNEL.dequantize(spec, tensors, k, torch.float64).T + bias.double()
    assert y.dtype == dtype
    # The packed CPU kernel rounds sums to bfloat16 once before the scales and once after.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), wanted, rtol=tolerance, atol=max(2e-5, tolerance * wanted.abs().mean())
    )


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_the_cpu_provider_agrees_with_the_reference(tokens):
    tensors, x = stored(33, 80), activations(tokens, 80).bfloat16()
    y = torch.ops.qcompiler.linear_int8(x, tensors["codes"], tensors["scales"], None)
    reference = linear_int8_reference(x, tensors["codes"], tensors["scales"], None)
    torch.testing.assert_close(y, reference, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("offset", [1, 8, 16])
def test_the_cpu_provider_takes_memory_that_begins_anywhere(offset):
    codes, scales = stored(32, 64).values()
    moved = torch.empty(32 * 64 + offset, dtype=torch.int8)[offset:].view(32, 64).copy_(codes)
    x = torch.empty(3 * 64 + offset, dtype=torch.bfloat16)[offset:].view(3, 64).copy_(activations(3, 64))
    y = torch.ops.qcompiler.linear_int8(x, moved, scales, None)
    torch.testing.assert_close(y, linear_int8_reference(x, codes, scales, None), rtol=2**-7, atol=1e-3)


def test_rows_are_quantized_without_their_outliers():
    x = torch.tensor([[1.0, -2.0, 6.0, 0.5], [0.25, 0.5, 1.0, -7.0], [0.0, 0.0, 0.0, 0.0]])
    codes, absmax, columns = quantize_rows(x, 6.0)
    assert columns.tolist() == [False, False, True, True]
    assert absmax.tolist() == [2.0, 1.0, 0.0]  # elements below the threshold count, whatever their column
    assert codes.tolist() == [[64, -127, 0, 0], [32, 64, 0, 0], [0, 0, 0, 0]]
    codes, absmax, columns = quantize_rows(x, 0.0)
    assert columns is None
    assert absmax.tolist() == [6.0, 7.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_columns_are_exact_and_the_rest_is_int8(dtype):
    spec = Int8ChannelSpec(outlier_threshold=6.0)
    tensors, x = stored(24, 100), activations(5, 100, {7: 90.0, 31: -60.0}).to(dtype)
    op, arguments = INT8_CHANNEL.op_call(spec, x, tensors, None, 100)
    y = op(*arguments)
    weight = INT8_CHANNEL.dequantize(spec, tensors, 100, torch.float64)
    codes, absmax, columns = quantize_rows(x, 6.0)
    wanted = (codes.double() * absmax.double()[:, None] / 127) @ weight.T
    wanted += x[:, columns].double() @ weight[:, columns].T
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)
    # Against the unquantized activations: one step of the rows' own scale, not of the outliers'.
    exact = x.double() @ weight.T
    plain = torch.ops.qcompiler.linear_llm_int8(x, tensors["codes"], tensors["scales"], None, 0.0).double()
    assert (y.double() - exact).norm() < (plain - exact).norm() / 5


def test_the_integer_provider_agrees_with_the_reference():
    tensors, x = stored(33, 70), activations(6, 70, {3: 8.0})
    arguments = (x, tensors["codes"], tensors["scales"], torch.randn(33), 6.0)
    y = torch.ops.qcompiler.linear_llm_int8(*arguments)
    torch.testing.assert_close(y, linear_llm_int8_reference(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_opcheck(threshold):
    spec = Int8ChannelSpec(threshold)
    op, arguments = INT8_CHANNEL.op_call(
        spec, activations(3, 70, {2: 9.0}), stored(10, 70), torch.randn(10), 70
    )
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_no_tokens_give_no_rows(threshold):
    op, arguments = INT8_CHANNEL.op_call(
        Int8ChannelSpec(threshold), torch.randn(0, 70), stored(10, 70), None, 70
    )
    assert op(*arguments).shape == (0, 10)


def test_accounting_json_and_side_by_side():
    spec = Int8ChannelSpec(6.0, torch.float16)
    assert get_format("int8_channel").spec_from_json(spec.to_json()) == spec
    assert INT8_CHANNEL.bits_per_weight(Int8ChannelSpec(), 64, 4096) == 8 + 32 / 4096
    parts = [stored(24, 64), stored(5, 64)]
    joined = INT8_CHANNEL.concat(spec, parts)
    wanted = torch.cat(
        [INT8_CHANNEL.dequantize(Int8ChannelSpec(), part, 64, torch.float32) for part in parts]
    )
    assert torch.equal(INT8_CHANNEL.dequantize(Int8ChannelSpec(), joined, 64, torch.float32), wanted)


def test_what_does_not_fit_is_refused_by_name():
    tensors = stored(10, 70)
    with pytest.raises(InvalidInputError, match="x has 64 features"):
        torch.ops.qcompiler.linear_int8(torch.randn(2, 64), tensors["codes"], tensors["scales"], None)
    with pytest.raises(InvalidInputError, match="linear_llm_int8: scales"):
        torch.ops.qcompiler.linear_llm_int8(
            torch.randn(2, 70), tensors["codes"], tensors["scales"][:3], None, 6.0
        )
    with pytest.raises(InvalidInputError, match="threshold is nan"):
        Int8ChannelSpec(float("nan"))
    with pytest.raises(InvalidInputError, match=r"not finite as torch\.float16"):
        INT8_CHANNEL.pack(Int8ChannelSpec(None, torch.float16), tensors["codes"], torch.full((10,), 1e6))
    with pytest.raises(InvalidInputError, match="different in_features"):
        INT8_CHANNEL.concat(Int8ChannelSpec(), [stored(4, 64), stored(4, 32)])
