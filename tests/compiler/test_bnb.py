"""Methods bnb and eetq against the packages that own them: bytes, statistics and the mixed product."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import INT8_CHANNEL, LUT4, Int8ChannelSpec, Lut4Spec
from qcompiler.kernels.formats.lut4 import dynamic_map, table
from qcompiler.methods.base import get_method, method_names

SHAPES = [(64, 256), (48, 136), (7, 70), (1, 64)]


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes").functional


def weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.05
    if n > 4:
        values[3] = 0.0
    return values.to(dtype)


def test_tables_equal_the_package(functional):
    for name in ("nf4", "fp4"):
        assert torch.equal(table(name), functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_bytes_and_absmax_equal_the_package(functional, n, k, quant_type, block, dtype):
    method, w = get_method("bnb"), weight(n, k, dtype)
    options = {"quant_type": quant_type, "double_quant": False}
    spec = method.resolve_spec(4, block, options)
    tensors = method.quantize(w, spec, options)
    packed, state = functional.quantize_4bit(w, blocksize=block, quant_type=quant_type)
    assert torch.equal(tensors["codes"].flatten(), packed.flatten())
    assert torch.equal(tensors["absmax"].flatten(), state.absmax)
    if block < 2048:  # beyond, the package compiles a kernel first, which takes a minute
        assert torch.equal(
            LUT4.dequantize(spec, tensors, k, dtype), functional.dequantize_4bit(packed, state)
        )


@pytest.mark.parametrize(("n", "k"), [(96, 512), (48, 136), (1, 64)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantization_equals_the_package(functional, n, k, quant_type):
    method, w = get_method("bnb"), weight(n, k)
    spec = method.resolve_spec(4, options={"quant_type": quant_type})
    assert spec == Lut4Spec(quant_type, 64, True)
    tensors = method.quantize(w, spec)
    packed, state = functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
    assert torch.equal(tensors["codes"].flatten(), packed.flatten())
    assert torch.equal(tensors["nested_offset"][0], state.offset)
    assert torch.equal(tensors["nested_absmax"], state.state2.absmax)
    # The package's CPU library looks the nearest step up on a grid of 2^16 points; its generic kernel,
    # taken for float64, and its GPU kernel compare distances.
    _, plain = functional.quantize_4bit(w, quant_type=quant_type)
    shifted = (plain.absmax - state.offset).double()
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise.default(shifted, state.state2.code, 256)
    assert torch.equal(tensors["absmax"].flatten(), exact)
    differ = (tensors["absmax"].flatten().int() - state.absmax.int()).abs()
    assert int(differ.max()) <= 1
    assert int((differ > 0).sum()) <= 0.01 * differ.numel() + 1
    # With the package's own absmax codes the dequantized weight is the package's.
    theirs = {**tensors, "absmax": state.absmax.view(tensors["absmax"].shape)}
    assert torch.equal(
        LUT4.dequantize(spec, theirs, k, torch.float32), functional.dequantize_4bit(packed, state)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int8_rows_equal_the_package(functional, dtype):
    method, w = get_method("bnb"), weight(33, 100, dtype)
    spec = method.resolve_spec(8)
    assert spec == Int8ChannelSpec(outlier_threshold=6.0)
    tensors = method.quantize(w, spec)
    codes, absmax, _ = functional.int8_vectorwise_quant(w.half())
    assert torch.equal(tensors["codes"], codes)
    torch.testing.assert_close(tensors["scales"] * 127, absmax, rtol=2e-7, atol=0)
    assert torch.equal((tensors["scales"] * 127).half().float(), absmax)  # SCB is recovered exactly


@pytest.mark.parametrize("outliers", [(), (3, 40)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_mixed_product_equals_the_package(functional, outliers, tokens):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    w = weight(48, 128, torch.float16)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(5)).clamp(-4, 4).half()
    for column in outliers:
        x[column % tokens, column] = 20.0 + column
    bias = torch.randn(48).half()
    method = get_method("bnb")
    spec = method.resolve_spec(8)
    op, arguments = INT8_CHANNEL.op_call(spec, x, method.quantize(w, spec), bias, 128)
    state = bitsandbytes.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
    state.CB, state.SCB, _ = functional.int8_vectorwise_quant(w.clone())
    theirs = bitsandbytes.matmul(x.clone(), w, bias=bias, state=state)
    # The package rounds to float16 after the integer part, and once more after the outlier columns.
    torch.testing.assert_close(op(*arguments), theirs, rtol=2e-3, atol=2e-3)


def test_eetq_divides_by_absmax_over_128_and_rounds_halves_away_from_zero():
    method = get_method("eetq")
    w = torch.tensor([[1.28, -1.28, 0.005, -0.015, 0.0049], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    w[0] = torch.tensor([128.0, -128.0, 0.5, -1.5, 0.49]) / 128
    tensors = method.quantize(w, method.resolve_spec(8))
    assert tensors["codes"].tolist() == [[127, -128, 1, -2, 0], [0, 0, 0, 0, 0]]
    assert tensors["scales"].tolist() == [1 / 128, 0.0]


def test_eetq_errs_by_half_a_step_and_by_one_at_the_top():
    method, w = get_method("eetq"), weight(33, 100)
    spec = method.resolve_spec(8)
    tensors = method.quantize(w, spec)
    error = (INT8_CHANNEL.dequantize(spec, tensors, 100, torch.float32) - w).abs() / tensors[
        "scales"
    ].clamp_min(1e-9)[:, None]
    top = tensors["codes"] == 127
    assert float(error[~top].max()) <= 0.501
    assert float(error[top].max()) <= 1.001


def test_the_registry_knows_them_and_options_reach_the_spec():
    assert {"bnb", "eetq"} <= set(method_names())
    bnb = get_method("bnb")
    assert bnb.resolve_spec(4, 128, {"quant_type": "fp4", "double_quant": False}) == Lut4Spec(
        "fp4", 128, False
    )
    assert bnb.resolve_spec(8, None, {"outlier_threshold": 0.0}) == Int8ChannelSpec(0.0)
    for method, bits, group, told in (
        ("bnb", 4, 48, "block size 48"), ("bnb", 8, 64, "one scale per output channel"),
        ("eetq", 8, 64, "one scale per output channel"), ("eetq", 4, None, "no 4-bit"),
        ("bnb", 3, None, "no 3-bit"),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=told):
            get_method(method).resolve_spec(bits, group)
    with pytest.raises(InvalidInputError, match="quant_type"):
        bnb.resolve_spec(4, None, {"quant_type": "int4"})


@pytest.mark.parametrize(("method", "bits"), [("bnb", 4), ("bnb", 8), ("eetq", 8)])
def test_a_weight_that_is_not_finite_is_refused_by_name(method, bits):
    w = weight(4, 64)
    w[1, 2] = float("nan")
    with pytest.raises(InvalidInputError, match=r"layer\.q_proj: 1 of 256 weights"):
        get_method(method).quantize(w, get_method(method).resolve_spec(bits), name="layer.q_proj")
