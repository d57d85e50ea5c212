"""Weights in onnxruntime's layouts, and zero points made integers."""

from __future__ import annotations

import pytest
import torch

from qcompiler.emit.onnx.packing import AffineWeight, blocks_of, pack_bits
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.methods.base import get_method
from qcompiler.methods.hqq import HQQ
from qcompiler.methods.integer_zeros import integer_groups

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

from onnx import helper, numpy_helper  # noqa: E402

from qcompiler.emit.onnx.builder import GraphBuilder, numpy_of  # noqa: E402
from qcompiler.emit.onnx.operators import translate  # noqa: E402
from qcompiler.emit.onnx.translation import Translation, Value  # noqa: E402
from qcompiler.kernels.formats.base import TensorSpec  # noqa: E402
from qcompiler.runtime.graph import Node, Ref, Weight  # noqa: E402

ROWS = 24


def product(method: str, bits: int, columns: int, group_size: int | None, options: dict) -> tuple:
    """x · Wᵀ by the ONNX operator of a quantized weight, and by its definition."""
    generator = torch.Generator().manual_seed(bits + columns)
    weight = torch.randn(ROWS, columns, generator=generator) + 0.1
    x = torch.randn(1, 5, columns, generator=generator)
    chosen = get_method(method)
    spec = chosen.resolve_spec(bits, group_size, options)
    tensors = chosen.quantize(weight, spec, options)
    format_ = get_format(spec.name)
    names = {part: f"w.{part}" for part in tensors}
    op, arguments = format_.op_call(spec, Ref("x"), {p: Weight(n) for p, n in names.items()}, None, columns)
    node = Node("y", str(op), op, arguments, {}, "float32", (1, "T", ROWS))
    t = Translation(
        GraphBuilder(),
        {names[part]: TensorSpec(tuple(v.shape), v.dtype) for part, v in tensors.items()},
        lambda name: tensors[name.removeprefix("w.")],
        torch.float32,
        torch.float32,
    )
    t.values["x"] = Value("x", torch.float32, (1, "T", columns))
    translate(t, node)
    y = t.values["y"]
    made = [
        numpy_helper.from_array(numpy_of(w.make()).reshape(w.shape), w.name)
        for w in t.builder.weights.values()
    ]
    graph = helper.make_graph(
        t.builder.nodes,
        "product",
        [helper.make_tensor_value_info("x", 1, [1, None, columns])],
        [helper.make_tensor_value_info(y.name, 1, [1, None, ROWS])],
        initializer=[*t.builder.constants, *made],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = x @ format_.dequantize(spec, tensors, columns, torch.float32).T
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected


@pytest.mark.parametrize(
    ("method", "bits", "columns", "group_size", "options"),
    [
        *(("rtn", bits, 192, 64, {"zeros": "integer"}) for bits in (2, 4, 8)),
        *(("rtn", 4, 256, size, {"zeros": "integer"}) for size in (16, 32, 128, 256)),
        ("hqq", 4, 200, 64, {"zeros": "integer"}),  # the last group is short
        ("hqq", 4, 320, 0, {"zeros": "integer"}),  # one group a row, repeated over blocks
        ("rtn", 2, 40, 16, {"zeros": "integer"}),
        ("bnb", 4, 192, None, {}),
        ("bnb", 4, 192, None, {"quant_type": "fp4"}),
        ("bnb", 4, 192, None, {"double_quant": False}),
        ("bnb", 4, 100, None, {}),  # blocks run across the ends of rows
        ("eetq", 8, 200, None, {}),
    ],
)
def test_an_operator_multiplies_with_what_is_stored(method, bits, columns, group_size, options):
    got, expected = product(method, bits, columns, group_size, options)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_low_bits_come_first_and_a_short_byte_is_padded(bits):
    values = torch.tensor([[1, 2, 3, 0, 3]], dtype=torch.uint8)
    packed = pack_bits(values, bits)
    wanted = {2: [1 | 2 << 2 | 3 << 4, 3], 4: [1 | 2 << 4, 3, 3], 8: [1, 2, 3, 0, 3]}[bits]
    assert packed.tolist() == [wanted]


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integer_zero_points_are_codes_and_cost_little(method, bits):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(64, 256, generator=generator) * torch.rand(64, 1, generator=generator)
    spec = AffineSpec(bits, 64)
    errors = {}
    for zeros in ("float", "integer"):
        tensors = get_method(method).quantize(weight, spec, {"zeros": zeros})
        stored = AFFINE.dequantize(spec, tensors, 256, torch.float32)
        errors[zeros] = float((stored - weight).square().sum() / weight.square().sum())
    points = tensors["zeros"].float()
    assert torch.equal(points, points.round().clamp(0, 2**bits - 1))
    assert errors["integer"] < 1.35 * errors["float"]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_for_integer_zero_points_finds_what_trying_all_of_them_finds(bits):
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    spec, ones = AffineSpec(bits, 64), torch.ones(48, 64)
    top = 2**bits - 1
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / top
    least = torch.full((48, 1), float("inf"))
    for zero in range(top + 1):
        for share in torch.linspace(0.3, 1.3, 50):
            codes = (values / (share * step) + zero).round().clamp(0, top)
            error = ((codes - zero) * share * step - values).square().sum(1, keepdim=True)
            least = torch.minimum(least, error)
    codes, scales, zeros = integer_groups(values, spec, ones, HQQ().clips(spec))
    found = ((codes - zeros) * scales - values).square().sum(1, keepdim=True)
    plain_codes, plain_scales, plain_zeros = integer_groups(values, spec, ones, ())
    plain = ((plain_codes - plain_zeros) * plain_scales - values).square().sum(1, keepdim=True)
    assert (found <= plain).all()
    assert found.sum() < 1.01 * least.sum()


@pytest.mark.parametrize("value", [0.0, 0.37, -2.5, 1e-4])
def test_groups_of_one_value_stay_that_value(value):
    spec = AffineSpec(4, 16)
    weight = torch.full((3, 32), value, dtype=torch.bfloat16)
    tensors = get_method("hqq").quantize(weight, spec, {"zeros": "integer"})
    assert torch.equal(AFFINE.dequantize(spec, tensors, 32, torch.float32), weight.float())


def test_zero_points_that_are_no_codes_are_not_packed():
    spec = AffineSpec(4, 16)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    tensors = get_method("rtn").quantize(weight, spec, {"zeros": "float"})
    stored = AffineWeight(spec, {part: part for part in tensors}, 32, tensors.__getitem__)
    with pytest.raises(InvalidInputError, match="no codes of 4 bits"):
        stored.zeros(blocks_of(spec, 4, 32))
