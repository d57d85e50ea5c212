"""aten operators that work element by element, and reductions, as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompiler.emit.onnx.translation import Translation, Value

Call = Mapping[str, Any]
Translator = Callable[[Translation, Call], Any]


def _unary(*ops: str) -> Translator:
    """A chain of ONNX operators of one input, on the result's dtype."""

    def translate(t: Translation, call: Call) -> Value:
        result = t.result("")
        name = t.tensor(next(iter(call.values())), result.dtype).name
        for op in ops:
            name = t.call(op, [name])
        return t.result(name)

    return translate


def _binary(op: str) -> Translator:
    """An ONNX operator of two inputs, both cast to the result's dtype; `alpha` multiplies the second."""

    def translate(t: Translation, call: Call) -> Value:
        dtype = t.result("").dtype
        left, right = t.tensor(call["self"], dtype).name, t.tensor(call["other"], dtype).name
        alpha = call.get("alpha", 1)
        if alpha != 1:
            right = t.call("Mul", [right, t.tensor(alpha, dtype).name])
        return t.result(t.call(op, [left, right]))

    return translate


def _compare(op: str, negate: bool = False) -> Translator:
    """A comparison: operands meet in the dtype that torch would promote them to."""

    def translate(t: Translation, call: Call) -> Value:
        left = t.tensor(call["self"])
        other = call["other"]
        if isinstance(other, (int, float)):
            number = torch.result_type(torch.empty(1, dtype=left.dtype), other)
            right = t.tensor(other, number)
        else:
            right = t.tensor(other)
        dtype = torch.promote_types(left.dtype, right.dtype)
        name = t.call(op, [t.cast(left, dtype).name, t.cast(right, dtype).name])
        return t.result(t.call("Not", [name]) if negate else name)

    return translate


def _to_dtype(t: Translation, call: Call) -> Value:
    return t.tensor(call["self"], t.result("").dtype)


def _same(t: Translation, call: Call) -> Value:
    return t.tensor(call["self"])


def _gelu(t: Translation, call: Call) -> Value:
    return t.result(gelu(t, t.tensor(call["self"]).name, call.get("approximate", "none")))


def gelu(t: Translation, x: str, approximate: str) -> str:
    """GELU by the error function, or its tanh approximation."""
    return t.call("Gelu", [x], approximate=approximate)


def _silu(t: Translation, call: Call) -> Value:
    return t.result(silu(t, t.tensor(call["self"]).name))


def silu(t: Translation, x: str) -> str:
    """X · sigmoid(x)."""
    return t.call("Mul", [x, t.call("Sigmoid", [x])])


def _power(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    base, exponent = call["self"], call["exponent"]
    return t.result(t.call("Pow", [t.tensor(base, dtype).name, t.tensor(exponent, dtype).name]))


def _clamp(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    name = t.tensor(call["self"], dtype).name
    for bound, op in (("min", "Max"), ("max", "Min")):
        if call.get(bound) is not None:
            name = t.call(op, [name, t.tensor(call[bound], dtype).name])
    return t.result(name)


def _square(t: Translation, call: Call) -> Value:
    x = t.tensor(call["self"]).name
    return t.result(t.call("Mul", [x, x]))


def _rsub(t: Translation, call: Call) -> Value:
    return _binary("Sub")(t, {**call, "self": call["other"], "other": call["self"]})


def _log1p(t: Translation, call: Call) -> Value:
    x = t.tensor(call["self"], t.result("").dtype)
    return t.result(t.call("Log", [t.call("Add", [x.name, t.tensor(1, x.dtype).name])]))


def _floor_divide(t: Translation, call: Call) -> Value:
    result = t.result("")
    left, right = t.tensor(call["self"], result.dtype).name, t.tensor(call["other"], result.dtype).name
    if result.dtype.is_floating_point:
        return t.result(t.call("Floor", [t.call("Div", [left, right])]))
    # ONNX divides integers toward zero; (a - a mod b) / b rounds down, as torch does.
    return t.result(t.call("Div", [t.call("Sub", [left, t.call("Mod", [left, right])]), right]))


def _where(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    chosen = [t.tensor(call[side], dtype).name for side in ("self", "other")]
    return t.result(t.call("Where", [t.tensor(call["condition"], torch.bool).name, *chosen]))


def _masked_fill(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    value = call["value"]
    filled = t.tensor(value, dtype).name
    return t.result(
        t.call("Where", [t.tensor(call["mask"], torch.bool).name, filled, t.tensor(call["self"], dtype).name])
    )


def _softmax(t: Translation, call: Call) -> Value:
    return t.result(
        t.call("Softmax", [t.tensor(call["self"], t.result("").dtype).name], axis=int(call["dim"]))
    )


def _reduce(op: str) -> Translator:
    def translate(t: Translation, call: Call) -> Value:
        x = t.tensor(call["self"], t.result("").dtype).name
        axes = call.get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        inputs = [x] if not axes else [x, t.ints(axes)]
        return t.result(t.call(op, inputs, keepdims=int(bool(call.get("keepdim", False)))))

    return translate


def _filled(value: float | None) -> Translator:
    """A tensor like another, all of one value."""

    def translate(t: Translation, call: Call) -> Value:
        result = t.result("")
        number = call["fill_value"] if value is None else value
        shape = t.call("Shape", [t.tensor(call["self"]).name])
        return t.result(t.call("Expand", [t.tensor(number, result.dtype).name, shape]))

    return translate


OPERATORS: dict[str, Translator] = {
    "aten.abs.default": _unary("Abs"),
    "aten.ceil.default": _unary("Ceil"),
    "aten.cos.default": _unary("Cos"),
    "aten.erf.default": _unary("Erf"),
    "aten.exp.default": _unary("Exp"),
    "aten.floor.default": _unary("Floor"),
    "aten.log.default": _unary("Log"),
    "aten.neg.default": _unary("Neg"),
    "aten.reciprocal.default": _unary("Reciprocal"),
    "aten.relu.default": _unary("Relu"),
    "aten.rsqrt.default": _unary("Sqrt", "Reciprocal"),
    "aten.sigmoid.default": _unary("Sigmoid"),
    "aten.sign.default": _unary("Sign"),
    "aten.sin.default": _unary("Sin"),
    "aten.sqrt.default": _unary("Sqrt"),
    "aten.tanh.default": _unary("Tanh"),
    "aten.bitwise_not.default": _unary("Not"),
    "aten.logical_not.default": _unary("Not"),
    "aten.add.Tensor": _binary("Add"),
    "aten.add.Scalar": _binary("Add"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.sub.Scalar": _binary("Sub"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.mul.Scalar": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.div.Scalar": _binary("Div"),
    "aten.true_divide.Tensor": _binary("Div"),
    "aten.maximum.default": _binary("Max"),
    "aten.minimum.default": _binary("Min"),
    "aten.matmul.default": _binary("MatMul"),
    "aten.logical_and.default": _binary("And"),
    "aten.logical_or.default": _binary("Or"),
    "aten.rsub.Scalar": _rsub,
    "aten.eq.Scalar": _compare("Equal"),
    "aten.eq.Tensor": _compare("Equal"),
    "aten.ne.Scalar": _compare("Equal", negate=True),
    "aten.ne.Tensor": _compare("Equal", negate=True),
    "aten.lt.Scalar": _compare("Less"),
    "aten.lt.Tensor": _compare("Less"),
    "aten.le.Scalar": _compare("LessOrEqual"),
    "aten.le.Tensor": _compare("LessOrEqual"),
    "aten.gt.Scalar": _compare("Greater"),
    "aten.gt.Tensor": _compare("Greater"),
    "aten.ge.Scalar": _compare("GreaterOrEqual"),
    "aten.ge.Tensor": _compare("GreaterOrEqual"),
    "aten.to.dtype": _to_dtype,
    "aten._to_copy.default": _to_dtype,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.alias.default": _same,
    "aten.detach.default": _same,
    "aten.gelu.default": _gelu,
    "aten.silu.default": _silu,
    "aten.pow.Tensor_Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
    "aten.pow.Scalar": _power,
    "aten.square.default": _square,
    "aten.clamp.default": _clamp,
    "aten.clamp.Tensor": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": _clamp,
    "aten.log1p.default": _log1p,
    "aten.floor_divide.default": _floor_divide,
    "aten.where.self": _where,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.masked_fill.Tensor": _masked_fill,
    "aten.softmax.int": _softmax,
    "aten.mean.dim": _reduce("ReduceMean"),
    "aten.sum.dim_IntList": _reduce("ReduceSum"),
    "aten.amax.default": _reduce("ReduceMax"),
    "aten.amin.default": _reduce("ReduceMin"),
    "aten.zeros_like.default": _filled(0.0),
    "aten.ones_like.default": _filled(1.0),
    "aten.full_like.default": _filled(None),
}
