"""aten operators that move elements (view, transpose, cat, slice ...), and sizes, as ONNX operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompiler.emit.onnx.translation import Translation, Value

Call = Mapping[str, Any]
Translator = Callable[[Translation, Call], Any]
_END = 1 << 62  # torch writes the largest int64 for "to the end"


def _view(t: Translation, call: Call) -> Value:
    sizes = call["shape"] if "shape" in call else call["size"]
    return t.reshape(t.tensor(call["self"]), sizes, t.result("").shape)


def _flatten(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    shape = t.result("").shape
    if sum(isinstance(size, str) for size in shape) > 1:
        raise t.refuse("flattens into more than one size that is not known")
    return t.reshape(value, shape, shape)


def _transpose(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    order = list(range(len(value.shape)))
    a, b = call["dim0"], call["dim1"]
    order[a], order[b] = order[b], order[a]
    return t.transpose(value, order)


def _t(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    return t.transpose(value, list(reversed(range(len(value.shape)))))


def _permute(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    rank = len(value.shape)
    return t.transpose(value, [d % rank for d in call["dims"]])


def _unsqueeze(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    axis = call["dim"] % (len(value.shape) + 1)
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    return Value(t.call("Unsqueeze", [value.name, t.ints([axis])]), value.dtype, shape)


def _squeeze(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    axes = call.get("dim")
    rank = len(value.shape)
    axes = [axes] if isinstance(axes, int) else list(range(rank)) if axes is None else axes
    axes = sorted(axis % rank for axis in axes if value.shape[axis] == 1)
    if not axes:
        return value
    shape = tuple(size for i, size in enumerate(value.shape) if i not in axes)
    return Value(t.call("Squeeze", [value.name, t.ints(axes)]), value.dtype, shape)


def _expand(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    sizes = call["size"]
    # -1 keeps a size, and in ONNX so does 1.
    kept = [1 if isinstance(size, int) and size == -1 else size for size in sizes]
    return t.result(t.call("Expand", [value.name, t.shape_of(kept)]))


def _repeat(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    repeats = call["repeats"]
    shape = (1,) * (len(repeats) - len(value.shape)) + value.shape
    value = t.reshape(value, shape, shape) if len(shape) != len(value.shape) else value
    return t.result(t.call("Tile", [value.name, t.shape_of(repeats)]))


def _repeat_interleave(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    dim, count = call.get("dim"), call["repeats"]
    if dim is None or not isinstance(count, int):
        raise t.refuse("repeats along no single axis")
    axis = dim % len(value.shape)
    wide = t.call("Unsqueeze", [value.name, t.ints([axis + 1])])
    ones = [1] * (len(value.shape) + 1)
    ones[axis + 1] = count
    tiled = Value(t.call("Tile", [wide, t.ints(ones)]), value.dtype, ())
    shape = t.result("").shape
    if sum(isinstance(size, str) for size in shape) > 1:
        raise t.refuse("has more than one size that is not known")
    return t.reshape(tiled, shape, shape)


def _cat(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    parts = [t.tensor(part, dtype).name for part in call["tensors"]]
    return t.result(t.call("Concat", parts, axis=int(call.get("dim", 0))))


def _stack(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    axis = int(call.get("dim", 0)) % len(t.result("").shape)
    parts = [t.call("Unsqueeze", [t.tensor(part, dtype).name, t.ints([axis])]) for part in call["tensors"]]
    return t.result(t.call("Concat", parts, axis=axis))


def _slice(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    start, end = call.get("start"), call.get("end")
    start = 0 if start is None else start
    end = _END if end is None else end
    step = call.get("step", 1)
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end >= _END and step == 1:
        return value
    axis = t.ints([call.get("dim", 0)])
    bounds = [t.size(min(b, _END) if isinstance(b, int) else b) for b in (start, end)]
    return t.result(t.call("Slice", [value.name, *bounds, axis, t.ints([step])]))


def _select(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    index = call["index"]
    if not isinstance(index, int):
        raise t.refuse("selects an index that the graph computes")
    return t.result(
        t.call("Gather", [value.name, t.builder.constant(index, torch.int64)], axis=int(call["dim"]))
    )


def _pieces(t: Translation, value: Value, sizes: list[int], axis: int) -> list[Value]:
    names = t.builder.calls("Split", [value.name, t.ints(sizes)], len(sizes), name=t.node.name, axis=axis)
    axis %= len(value.shape)
    return [
        Value(name, value.dtype, (*value.shape[:axis], size, *value.shape[axis + 1 :]))
        for name, size in zip(names, sizes, strict=True)
    ]


def _known_size(t: Translation, value: Value, axis: int) -> int:
    size = value.shape[axis]
    if not isinstance(size, int):
        raise t.refuse("splits an axis whose size is not known")
    return size


def _split(t: Translation, call: Call) -> list[Value]:
    value, axis = t.tensor(call["self"]), int(call.get("dim", 0))
    size = _known_size(t, value, axis)
    given = call["split_size"] if "split_size" in call else call["split_sizes"]
    sizes = given if isinstance(given, list) else [min(given, size - i) for i in range(0, size, given)]
    return _pieces(t, value, sizes, axis)


def _chunk(t: Translation, call: Call) -> list[Value]:
    value, axis = t.tensor(call["self"]), int(call.get("dim", 0))
    size = _known_size(t, value, axis)
    each = -(-size // call["chunks"])
    return _pieces(t, value, [min(each, size - i) for i in range(0, size, each)], axis)


def _unbind(t: Translation, call: Call) -> list[Value]:
    value, axis = t.tensor(call["self"]), int(call.get("dim", 0))
    pieces = _pieces(t, value, [1] * _known_size(t, value, axis), axis)
    axis %= len(value.shape)
    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    return [Value(t.call("Squeeze", [p.name, t.ints([axis])]), p.dtype, shape) for p in pieces]


def _index_select(t: Translation, call: Call) -> Value:
    value = t.tensor(call["self"])
    if call["index"] is t.values.get("logits_rows"):
        return value  # the ONNX graph gives the logits of every row
    index = t.tensor(call["index"])
    return t.result(t.call("Gather", [value.name, index.name], axis=int(call["dim"])))


def _index(t: Translation, call: Call) -> Value:
    value, indices = t.tensor(call["self"]), call["indices"]
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or t.tensor(indices[given[0]]).dtype == torch.bool:
        raise t.refuse("indexes by a mask, or along several axes at once")
    return t.result(t.call("Gather", [value.name, t.tensor(indices[given[0]]).name], axis=given[0]))


def _arange(t: Translation, call: Call) -> Value:
    dtype = t.result("").dtype
    bounds = [call.get("start", 0), call["end"], call.get("step", 1)]
    names = []
    for bound in bounds:
        if isinstance(bound, Value):
            scalar = Value(t.call("Squeeze", [t.size(bound)]), torch.int64, ())
            names.append(t.cast(scalar, dtype).name)
        else:
            names.append(t.builder.constant(bound, dtype))
    return t.result(t.call("Range", names))


# Sizes.


def _size(t: Translation, call: Call) -> Any:
    value, axis = call["a"], call["b"]
    known = value.shape[axis]
    if isinstance(known, int):
        return known
    return Value(
        t.call("Shape", [value.name], start=axis % len(value.shape), end=axis % len(value.shape) + 1),
        torch.int64,
        (1,),
    )


def _getitem(t: Translation, call: Call) -> Any:
    return call["a"][call["b"]]


def _arithmetic(op: str, known: Callable[[Any, Any], Any]) -> Translator:
    def translate(t: Translation, call: Call) -> Any:
        a, b = call["a"], call["b"]
        if isinstance(a, int) and isinstance(b, int):
            return known(a, b)
        return Value(t.call(op, [t.size(a), t.size(b)]), torch.int64, (1,))

    return translate


OPERATORS: dict[str, Translator] = {
    "aten.view.default": _view,
    "aten.reshape.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.flatten.using_ints": _flatten,
    "aten.transpose.int": _transpose,
    "aten.t.default": _t,
    "aten.permute.default": _permute,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.cat.default": _cat,
    "aten.concat.default": _cat,
    "aten.stack.default": _stack,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.split.Tensor": _split,
    "aten.split.sizes": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _chunk,
    "aten.unbind.int": _unbind,
    "aten.index_select.default": _index_select,
    "aten.index.Tensor": _index,
    "aten.arange.default": _arange,
    "aten.arange.start": _arange,
    "aten.arange.start_step": _arange,
    "sym.size": _size,
    "sym.getitem": _getitem,
    "sym.add": _arithmetic("Add", operator.add),
    "sym.sub": _arithmetic("Sub", operator.sub),
    "sym.mul": _arithmetic("Mul", operator.mul),
    "sym.floordiv": _arithmetic("Div", operator.floordiv),
    "sym.min": _arithmetic("Min", min),
    "sym.max": _arithmetic("Max", max),
}
