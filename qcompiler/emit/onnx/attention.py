"""Attention with a KV cache as ONNX inputs and outputs: GroupQueryAttention, or basic operators.

Our graph lays the tokens of all sequences end to end; here they are a batch [batch, sequence] again,
only around attention. The cache of layer i comes in as `past_key_values.i.key` and `.value`,
[batch, kv heads, past, head size], and leaves as `present.i.key` and `.value`.

The basic form counts positions along the attention mask, so that rows may be padded on either side.
GroupQueryAttention takes the sum of the mask for a row's length: padding goes to the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.emit.onnx.builder import CONTRIB, ONNX_TYPES
from qcompiler.emit.onnx.layers import rotate_tokens
from qcompiler.emit.onnx.translation import Translation, Value
from qcompiler.runtime.graph import Graph, Weight, bind

Call = Mapping[str, Any]
MASK = "attention_mask"
_HIDDEN = -1e30  # far below any score, and still finite in float32: a row that sees no key is no NaN
_HIDDEN_HALF = -6e4


@dataclass
class Pages:
    """The cache of one layer: what this step adds, and its ONNX outputs once some attention made them."""

    index: int
    key: Value
    value: Value
    present: tuple[str, str] | None = None


def past_name(index: int | str, part: str) -> str:
    """Input that brings the cache of a layer; `part` is key or value."""
    return f"past_key_values.{index}.{part}"


def present_name(index: int | str, part: str) -> str:
    """Output that gives it back."""
    return f"present.{index}.{part}"


def grouped_query_obstacle(graph: Graph) -> str | None:
    """Why GroupQueryAttention cannot say the attention of a decoder, or None if it can."""
    sizes = {i.name: i.shape[-1] for i in graph.inputs if len(i.shape) == 4}
    for node in graph.nodes:
        if node.op != "qcompiler.paged_attention.default":
            continue
        call = bind(node)
        key, value = (sizes.get(call[pages].name) for pages in ("k_pages", "v_pages"))
        if not call["causal"] or call["chunk"]:
            return f"{node.name} is chunked or not causal"
        if key != value or not isinstance(key, int) or key % 8:
            return f"{node.name} has heads of {key} and {value}, not of one multiple of 8"
    return None


def _kv_append(t: Translation, call: Call) -> None:
    _keep(t, call, t.tensor(call["k"]))


def _rotary_kv_append(t: Translation, call: Call) -> Value:
    _keep(t, call, rotate_tokens(t, t.tensor(call["k"]), call))
    return rotate_tokens(t, t.tensor(call["q"]), call)


def _keep(t: Translation, call: Call, key: Value) -> None:
    pages = call["k_pages"].name
    t.caches["pages", pages] = Pages(int(pages.rpartition("_")[2]), key, t.tensor(call["v"]))


def _paged_attention(t: Translation, call: Call) -> Value:
    pages: Pages | None = t.caches.get(("pages", call["k_pages"].name))
    if pages is None:
        raise t.refuse("reads a cache that nothing was appended to")
    q = t.tensor(call["q"])
    if t.plain_attention:
        out = _with_cache(t, q, pages, call)
    else:
        out = _grouped_query(t, q, pages, call)
    result = t.result("")
    return t.reshape(out, result.shape, result.shape)


def _ragged_attention(t: Translation, call: Call) -> Value:
    q, k, v = (_batched(t, t.tensor(call[part])) for part in "qkv")
    keys, values = (t.transpose(x, (0, 2, 1, 3)) for x in (k, v))
    out = _attend(t, q, keys, values, call)
    result = t.result("")
    return t.reshape(out, result.shape, result.shape)


def _batched(t: Translation, x: Value, flat: bool = False) -> Value:
    """[tokens, heads, size] as [batch, sequence, heads, size], or with heads and sizes in one axis."""
    tail = [x.shape[1] * x.shape[2]] if flat else [x.shape[1], x.shape[2]]  # type: ignore[operator]
    key = ("batched", *tail)
    if key not in t.caches:
        t.caches[key] = t.call("Concat", [t.caches["ids_shape"], t.ints(tail)], axis=0)  # type: ignore[arg-type]
    return Value(t.call("Reshape", [x.name, t.caches[key]]), x.dtype, ("batch", "sequence", *tail))


def _lengths(t: Translation) -> tuple[str, str]:
    """GroupQueryAttention's `seqlens_k` int32 [batch] and `total_sequence_length` int32 []."""
    if "lengths" not in t.caches:
        sums = t.call("ReduceSum", [MASK, t.ints([1])], keepdims=0)
        last = t.call("Cast", [t.call("Sub", [sums, t.builder.constant(1)])], to=ONNX_TYPES[torch.int32])
        total = t.call("Gather", [t.call("Shape", [MASK]), t.builder.constant(1)], axis=0)
        t.caches["lengths"] = (last, t.call("Cast", [total], to=ONNX_TYPES[torch.int32]))
    return t.caches["lengths"]


def _grouped_query(t: Translation, q: Value, pages: Pages, call: Call) -> Value:
    first = pages.present is None
    outputs = [present_name(pages.index, part) if first else "" for part in ("key", "value")]
    heads, kv_heads, size = q.shape[1], pages.key.shape[1], q.shape[2]
    inputs = [_batched(t, x, flat=True).name for x in (q, pages.key, pages.value)]
    inputs += [past_name(pages.index, "key"), past_name(pages.index, "value"), *_lengths(t)]
    if call["sinks"] is not None:
        inputs += ["", "", "", "", t.tensor(call["sinks"], q.dtype).name]
    label = f"{t.node.name}_out"
    t.builder.calls(
        "GroupQueryAttention",
        inputs,
        [label, *outputs] if first else [label],
        domain=CONTRIB,
        name=t.node.name,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(call["scale"]),
        local_window_size=call["window"] or None,
        softcap=float(call["softcap"]) or None,
    )
    if first:
        pages.present = (outputs[0], outputs[1])
    return Value(label, q.dtype, ("batch", "sequence", heads * size))  # type: ignore[operator]


def _with_cache(t: Translation, q: Value, pages: Pages, call: Call) -> Value:
    if pages.present is None:
        names = []
        for part, new in (("key", pages.key), ("value", pages.value)):
            rows = t.transpose(_batched(t, new), (0, 2, 1, 3))
            out = present_name(pages.index, part)
            t.builder.calls("Concat", [past_name(pages.index, part), rows.name], [out], axis=2)
            names.append(out)
        pages.present = (names[0], names[1])
    keys, values = (
        Value(name, x.dtype, ("batch", x.shape[1], "total", x.shape[2]))
        for name, x in zip(pages.present, (pages.key, pages.value), strict=True)
    )
    return _attend(t, _batched(t, q), keys, values, call)


def _attend(t: Translation, q: Value, keys: Value, values: Value, call: Call) -> Value:
    """Q [batch, sequence, heads, size]; keys, values [batch, kv heads, total, size]; in basic operators.

    The heads of a group are rows of one matrix, so that no key is repeated.
    """
    heads, kv_heads = q.shape[2], keys.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise t.refuse("its heads are not known")
    group = heads // kv_heads
    dtype = q.dtype
    channels = values.shape[3]
    scaled = t.call("Mul", [q.name, t.tensor(float(call["scale"]), dtype).name])
    rows = t.call("Transpose", [scaled], perm=[0, 2, 1, 3])  # [batch, heads, sequence, size]
    shape = [0, kv_heads, -1, q.shape[3]]
    folded = t.call("Reshape", [rows, t.ints(shape)]) if group > 1 else rows  # type: ignore[arg-type]
    scores = t.call("MatMul", [folded, t.call("Transpose", [keys.name], perm=[0, 1, 3, 2])])
    if group > 1:
        scores = t.call("Reshape", [scores, _score_shape(t, kv_heads, group)])
    if call["softcap"]:
        cap = t.tensor(float(call["softcap"]), dtype).name
        scores = t.call("Mul", [t.call("Tanh", [t.call("Div", [scores, cap])]), cap])
    bias = _bias(t, dtype, bool(call["causal"]), call["window"], call["chunk"])
    if group > 1:
        bias = _grouped_bias(t, bias)
    scores = t.call("Add", [scores, bias])
    weights = _softmax(t, scores, call["sinks"], dtype, kv_heads, group)
    if group > 1:
        weights = t.call("Reshape", [weights, _folded_shape(t, kv_heads)])
    mixed = t.call("MatMul", [weights, values.name])
    if group > 1:
        mixed = t.call("Reshape", [mixed, _heads_shape(t, heads, channels)])
    out = t.call("Transpose", [mixed], perm=[0, 2, 1, 3])
    return Value(out, dtype, ("batch", "sequence", heads, channels))


def _softmax(t: Translation, scores: str, sinks: Any, dtype: torch.dtype, kv_heads: int, group: int) -> str:
    """Softmax over keys; a sink is one more logit, dropped afterwards."""
    if sinks is None:
        return t.call("Softmax", [scores], axis=-1)
    if not isinstance(sinks, (Value, Weight)):
        raise t.refuse("its sinks are not a tensor")
    shape = [1, kv_heads, group, 1, 1] if group > 1 else [1, kv_heads, 1, 1]
    column = t.call("Reshape", [t.tensor(sinks, dtype).name, t.ints(shape)])
    size = t.call("Shape", [scores], start=0, end=-1)
    column = t.call("Expand", [column, t.call("Concat", [size, t.ints([1])], axis=0)])
    weights = t.call("Softmax", [t.call("Concat", [scores, column], axis=-1)], axis=-1)
    return t.call("Slice", [weights, t.ints([0]), t.ints([-1]), t.ints([-1])])


def _total(t: Translation) -> str:
    return _cached(t, "total", lambda: t.call("Shape", [MASK], start=1, end=2))


def _batch(t: Translation) -> str:
    return _cached(t, "batch", lambda: t.call("Slice", [t.caches["ids_shape"], t.ints([0]), t.ints([1])]))


def _sequence(t: Translation) -> str:
    return _cached(t, "sequence", lambda: t.call("Slice", [t.caches["ids_shape"], t.ints([1]), t.ints([2])]))


def _score_shape(t: Translation, kv_heads: int, group: int) -> str:
    """[batch, kv heads, group, sequence, total]."""
    return _cached(
        t,
        ("scores", kv_heads, group),
        lambda: t.call("Concat", [_batch(t), t.ints([kv_heads, group]), _sequence(t), _total(t)], axis=0),
    )


def _folded_shape(t: Translation, kv_heads: int) -> str:
    """[batch, kv heads, group · sequence, total]."""
    return _cached(
        t,
        ("folded", kv_heads),
        lambda: t.call("Concat", [_batch(t), t.ints([kv_heads, -1]), _total(t)], axis=0),
    )


def _heads_shape(t: Translation, heads: int, channels: Any) -> str:
    """[batch, heads, sequence, channels]."""
    return _cached(
        t,
        ("heads", heads, channels),
        lambda: t.call("Concat", [_batch(t), t.ints([heads]), _sequence(t), t.ints([channels])], axis=0),
    )


def _grouped_bias(t: Translation, bias: str) -> str:
    return _cached(t, ("grouped", bias), lambda: t.call("Unsqueeze", [bias, t.ints([2])]))


def _positions(t: Translation) -> tuple[str, str, str, str]:
    """Places along the mask and positions (places less padding) of queries and keys, int64.

    Query and key places [sequence, 1], [1, total]; positions [batch, sequence, 1], [batch, 1, total].
    """

    def make() -> tuple[str, str, str, str]:
        zero, one = t.builder.constant(0), t.builder.constant(1)
        total = t.call("Squeeze", [_total(t)])
        sequence = t.call("Squeeze", [_sequence(t)])
        first = t.call("Sub", [total, sequence])
        places = t.call("Range", [zero, total, one])
        queries = t.call("Unsqueeze", [t.call("Range", [first, total, one]), t.ints([1])])
        keys = t.call("Unsqueeze", [places, t.ints([0])])
        counted = t.call("Sub", [t.call("CumSum", [MASK, t.builder.constant(1)]), one])
        start = t.call("Reshape", [first, t.ints([1])])
        own = t.call("Slice", [counted, start, _total(t), t.ints([1])])
        return (
            queries,
            keys,
            t.call("Unsqueeze", [own, t.ints([2])]),
            t.call("Unsqueeze", [counted, t.ints([1])]),
        )

    return _cached(t, "positions", make)


def _bias(t: Translation, dtype: torch.dtype, causal: bool, window: int, chunk: int) -> str:
    """0 where a query sees a key and a very negative number elsewhere, [batch, 1, sequence or 1, total]."""

    def make() -> str:
        seen = t.call(
            "Unsqueeze", [t.call("Cast", [MASK], to=ONNX_TYPES[torch.bool]), t.ints([1])]
        )  # [batch, 1, total]
        queries, keys, q_positions, k_positions = _positions(t) if causal or window or chunk else ("",) * 4
        if causal:
            seen = t.call("And", [seen, t.call("LessOrEqual", [keys, queries])])
        if window:
            distance = t.call("Sub", [q_positions, k_positions])
            if not causal:
                distance = t.call("Abs", [distance])
            limit = t.builder.constant(window if causal else window + 1)
            seen = t.call("And", [seen, t.call("Less", [distance, limit])])
        if chunk:
            size = t.builder.constant(chunk)
            chunks = [t.call("Div", [p, size]) for p in (q_positions, k_positions)]
            seen = t.call("And", [seen, t.call("Equal", chunks)])
        hidden = _HIDDEN_HALF if dtype == torch.float16 else _HIDDEN
        bias = t.call("Where", [seen, t.tensor(0.0, dtype).name, t.tensor(hidden, dtype).name])
        return t.call("Unsqueeze", [bias, t.ints([1])])

    return _cached(t, ("bias", dtype, causal, window, chunk), make)


def _cached(t: Translation, key: Any, make: Callable[[], Any]) -> Any:
    if key not in t.caches:
        t.caches[key] = make()
    return t.caches[key]


OPERATORS: dict[str, Callable[[Translation, Call], Any]] = {
    "qcompiler.kv_append.default": _kv_append,
    "qcompiler.rotary_kv_append.default": _rotary_kv_append,
    "qcompiler.paged_attention.default": _paged_attention,
    "qcompiler.ragged_attention.default": _ragged_attention,
}
