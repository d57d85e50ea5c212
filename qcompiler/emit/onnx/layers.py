"""Float linears and embeddings, normalization, rotary embedding and gated activations as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompiler.emit.onnx.builder import CONTRIB
from qcompiler.emit.onnx.pointwise import gelu, silu
from qcompiler.emit.onnx.translation import Translation, Value
from qcompiler.runtime.graph import Weight

Call = Mapping[str, Any]


def _linear(t: Translation, call: Call) -> Value:
    result = t.result("")
    x = t.tensor(call["input"], result.dtype)
    weight = t.tensor(call["weight"], result.dtype)
    bias = call.get("bias")
    # Gemm takes the weight as it is stored, so that a tied embedding is one tensor; but it takes matrices.
    rows = t.reshape(x, [-1, weight.shape[1]], ("rows", weight.shape[1])).name
    inputs = [rows, weight.name] if bias is None else [rows, weight.name, t.tensor(bias, result.dtype).name]
    product = Value(t.call("Gemm", inputs, transB=1), result.dtype, ("rows", weight.shape[0]))
    return t.reshape(product, result.shape, result.shape)


def _embedding(t: Translation, call: Call) -> Value:
    table, ids = call["weight"], t.tensor(call["indices"])
    # Rows are cast after they were found, where the table is smaller as it is stored.
    source = t.stored(table.name) if isinstance(table, Weight) and t.narrower(table.name) else t.tensor(table)
    found = Value(t.call("Gather", [source.name, ids.name], axis=0), source.dtype, t.result("").shape)
    return t.cast(found, t.result("").dtype)


def _scale(t: Translation, weight: Any, offset: float, dtype: torch.dtype, size: int) -> str:
    """The factor of a norm, offset + weight, in the activation dtype."""
    if weight is None:
        return t.builder.constant([1.0] * size, dtype)
    if offset == 0 or not isinstance(weight, Weight):
        scale = t.tensor(weight, dtype)
        return scale.name if offset == 0 else t.call("Add", [scale.name, t.tensor(offset, dtype).name])
    name = weight.name
    return t.builder.weight(
        f"{name}.offset", dtype, t.tensors[name].shape, lambda: (t.read(name).float() + offset).to(dtype)
    )


def _columns(t: Translation, x: Value) -> int:
    size = x.shape[-1]
    if not isinstance(size, int):
        raise t.refuse("the last axis of its input has no known size")
    return size


def _rms_norm(t: Translation, call: Call) -> Value:
    x = t.tensor(call["x"])
    scale = _scale(t, call["weight"], call["offset"], x.dtype, _columns(t, x))
    return t.result(
        t.call("RMSNormalization", [x.name, scale], axis=-1, epsilon=call["eps"], stash_type=1), x.dtype
    )


def _add_rms_norm(t: Translation, call: Call) -> list[Value]:
    x = t.tensor(call["x"])
    residual = t.tensor(call["residual"], x.dtype)
    scale = _scale(t, call["weight"], call["offset"], x.dtype, _columns(t, x))
    label = t.node.name
    normed, _, _, total = t.builder.calls(
        "SkipSimplifiedLayerNormalization",
        [x.name, residual.name, scale],
        [f"{label}_normed", "", "", f"{label}_total"],
        domain=CONTRIB,
        name=label,
        epsilon=call["eps"],
    )
    return [Value(normed, x.dtype, x.shape), Value(total, x.dtype, x.shape)]


def _layer_norm(t: Translation, call: Call) -> Value:
    x = t.tensor(call["x"])
    inputs = [x.name, _scale(t, call["weight"], 0.0, x.dtype, _columns(t, x))]
    if call["bias"] is not None:
        inputs.append(t.tensor(call["bias"], x.dtype).name)
    return t.result(t.call("LayerNormalization", inputs, axis=-1, epsilon=call["eps"]), x.dtype)


def _rotary(t: Translation, call: Call) -> Value:
    x = t.tensor(call["x"])
    if len(x.shape) != 4:
        raise t.refuse(f"rotates {x.shape}, not [1, heads, tokens, size]")
    return t.result(_rotate(t, x.name, x.dtype, x.shape[-1], call), x.dtype, x.shape)


def _rotate(t: Translation, name: str, dtype: torch.dtype, size: Any, call: Call, **attributes: Any) -> str:
    interleaved = bool(call["interleaved"])
    tables = [t.tensor(call[part], dtype) for part in ("cos", "sin")]
    rotated = tables[0].shape[-1]
    tables = [_one_table(t, table) for table in tables]
    if not isinstance(rotated, int):
        raise t.refuse(f"rotates by tables {list(tables[0].shape)} of no known width")
    # Both halves of a table are equal (or each entry stands twice in a row); ONNX takes them once.
    halves = [_half_table(t, table, rotated, interleaved) for table in tables]
    return t.call(
        "RotaryEmbedding",
        [name, *halves],
        interleaved=int(interleaved),
        rotary_embedding_dim=0 if rotated == size else rotated,
        **attributes,
    )


def rotate_tokens(t: Translation, x: Value, call: Call) -> Value:
    """X [tokens, heads, size] rotated as the call of `rotary_kv_append` says."""
    tokens, heads, size = x.shape
    if not isinstance(heads, int) or not isinstance(size, int):
        raise t.refuse(f"rotates {x.shape}, whose heads are not known")
    flat = t.reshape(x, [1, -1, heads * size], (1, tokens, heads * size))
    name = _rotate(t, flat.name, x.dtype, size, call, num_heads=heads)
    return t.reshape(Value(name, x.dtype, flat.shape), [-1, heads, size], x.shape)


def _one_table(t: Translation, table: Value) -> Value:
    """A table as [1, tokens, columns]; one for each head is none."""
    rank = len(table.shape)
    if rank == 3 and table.shape[0] == 1:
        return table
    if rank == 2 or (rank == 4 and table.shape[:2] == (1, 1)):
        shape = (1, *table.shape[-2:])
        key = ("table", table.name)
        if key not in t.caches:
            t.caches[key] = t.reshape(table, shape, shape)
        return t.caches[key]
    raise t.refuse(f"rotates by tables {list(table.shape)}, which RotaryEmbedding does not take")


def _half_table(t: Translation, table: Value, rotated: int, interleaved: bool) -> str:
    key = ("half", table.name, interleaved)
    if key not in t.caches:
        bounds = (0, rotated, 2) if interleaved else (0, rotated // 2, 1)
        t.caches[key] = t.slice(table, 2, *bounds).name
    return t.caches[key]


def _silu_mul(t: Translation, call: Call) -> Value:
    gate = t.tensor(call["gate"])
    up = t.tensor(call["up"], gate.dtype)
    return t.result(t.call("Mul", [silu(t, gate.name), up.name]), gate.dtype)


def _gelu_mul(t: Translation, call: Call) -> Value:
    gate = t.tensor(call["gate"])
    up = t.tensor(call["up"], gate.dtype)
    return t.result(t.call("Mul", [gelu(t, gate.name, call["approximate"]), up.name]), gate.dtype)


OPERATORS: dict[str, Callable[[Translation, Call], Any]] = {
    "aten.linear.default": _linear,
    "aten.embedding.default": _embedding,
    "qcompiler.rms_norm.default": _rms_norm,
    "qcompiler.add_rms_norm.default": _add_rms_norm,
    "qcompiler.layer_norm.default": _layer_norm,
    "qcompiler.rotary.default": _rotary,
    "qcompiler.silu_mul.default": _silu_mul,
    "qcompiler.gelu_mul.default": _gelu_mul,
}
