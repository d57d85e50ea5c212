"""Walks our graph and gives an ONNX model, its weights still to be written.

A decoder takes `input_ids`, `position_ids` [batch, sequence], `attention_mask` [batch, past + sequence]
and a cache per layer, and gives `logits` [batch, sequence, vocabulary] and the caches with this step
appended. An encoder takes `input_ids`, `attention_mask` and, if it has them, `token_type_ids`.

Our graph's one axis of tokens is the batch laid end to end, which is exact: only attention looks
across tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcompiler.emit.onnx.attention import MASK, grouped_query_obstacle, past_name, present_name
from qcompiler.emit.onnx.builder import CONTRIB, IR_VERSION, ONNX_TYPES, OPSET, GraphBuilder, Initializer
from qcompiler.emit.onnx.operators import translate
from qcompiler.emit.onnx.translation import Translation, Value
from qcompiler.kernels.errors import UnsupportedModelError
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.runtime.graph import Graph

if TYPE_CHECKING:
    from onnx import ModelProto

_TOKENS = ("input_ids", "position_ids", "token_type_ids")
_CACHE = ("k_pages_", "v_pages_")


@dataclass(frozen=True)
class Cache:
    """Heads and head sizes of one layer's cache."""

    index: int
    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class OnnxGraph:
    """A translated graph.

    Attributes:
        model: Nodes and small constants.
        weights: What is still to be written, in order of first use.
        caches: One per layer with a cache; empty for encoders.
        operators: How often each operator stands in it.
        notes: What the user should know.
    """

    model: ModelProto
    weights: tuple[Initializer, ...]
    caches: tuple[Cache, ...]
    operators: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GraphOptions:
    """How to translate.

    Attributes:
        compute: Activation dtype of the artifact.
        target: Activation dtype of the ONNX graph.
        vocab_size: Rows of the logits.
        position_offset: Position id of an encoder's first token.
        accuracy_level: See `Translation`.
        plain_attention: See `Translation`.
        float_zeros: See `Translation`.
    """

    compute: torch.dtype
    target: torch.dtype = torch.float32
    vocab_size: int = 0
    position_offset: int = 0
    accuracy_level: int = 0
    plain_attention: bool = False
    float_zeros: bool = False


def translate_graph(
    graph: Graph,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor] | None,
    options: GraphOptions,
) -> OnnxGraph:
    """Translate a graph of an artifact.

    Args:
        graph: The lowered graph.
        tensors: Dtype and shape of each stored tensor.
        read: Gives a stored tensor; called when weights are written. None: only find out whether ONNX can
            say the graph.
        options: See `GraphOptions`.

    Raises:
        UnsupportedModelError: ONNX cannot say a part of it; names node and op.
    """
    for node in graph.nodes:
        if node.op.startswith("qcompiler.grouped_"):
            raise UnsupportedModelError(
                f"graph node {node.name!r}: ONNX emission does not know mixtures of experts ({node.op})",
                hint="Emit the artifact alone.",
            )
    decoder = graph.kind == "decoder"
    obstacle = grouped_query_obstacle(graph) if decoder and not options.plain_attention else None
    t = Translation(
        GraphBuilder(),
        tensors,
        read or _no_weights,
        options.compute,
        options.target,
        accuracy_level=options.accuracy_level,
        plain_attention=options.plain_attention or obstacle is not None,
        float_zeros=options.float_zeros,
        dry=read is None,
    )
    if obstacle is not None:
        t.notes.add(f"attention is emitted in basic operators, not as GroupQueryAttention: {obstacle}")
    caches = _caches(graph)
    inputs = _inputs(t, graph, options)
    for node in graph.nodes:
        translate(t, node)
    outputs = _outputs(t, graph, options)
    return _finish(t, graph, options, caches, inputs, outputs)


def _no_weights(name: str) -> torch.Tensor:
    raise UnsupportedModelError(f"tensor {name!r} decides what the ONNX graph looks like")


def _caches(graph: Graph) -> tuple[Cache, ...]:
    shapes = {i.name: i.shape for i in graph.inputs if i.name.startswith(_CACHE)}
    found = []
    for name, shape in shapes.items():
        if name.startswith("k_pages_"):
            index = int(name.rpartition("_")[2])
            heads, size = shape[2], shape[3]
            value = shapes[f"v_pages_{index}"][3]
            if not (isinstance(heads, int) and isinstance(size, int) and isinstance(value, int)):
                raise UnsupportedModelError(f"graph input {name!r} has heads of no known size")
            found.append(Cache(index, heads, size, value))
    return tuple(sorted(found, key=lambda cache: cache.index))


def _inputs(t: Translation, graph: Graph, options: GraphOptions) -> list[str]:
    """Bind the graph's inputs to those of the ONNX graph; returns the names of [batch, sequence] inputs."""
    build = t.builder
    t.caches["ids_shape"] = build.call("Shape", ["input_ids"], name="ids_shape")
    flat = build.constant([1, -1])
    names = []
    for declared in graph.inputs:
        name = declared.name
        if name == "position_ids" and graph.kind == "encoder":
            t.values[name] = Value(_encoder_positions(t, options.position_offset), torch.int64, (1, "T"))
        elif name in _TOKENS:
            names.append(name)
            value = build.call("Reshape", [name, flat], name=f"{name}_flat")
            t.values[name] = Value(value, torch.int64, (1, "T"))
        elif name.startswith(_CACHE) or declared.dtype in ("int", "int32", "int64"):
            t.values[name] = Value(name, torch.int64, declared.shape)  # stands for what attention keeps
        else:
            raise UnsupportedModelError(f"graph input {name!r} has no place in an ONNX model")
    return names


def _encoder_positions(t: Translation, offset: int) -> str:
    """Position ids 0 … sequence - 1 (plus offset) of every row, [1, batch · sequence]."""
    build = t.builder
    sequence = build.call("Gather", [t.caches["ids_shape"], build.constant(1)], axis=0, name="sequence")
    first, one = build.constant(offset), build.constant(1)
    end = build.call("Add", [sequence, first], name="end") if offset else sequence
    row = build.call("Range", [first, end, one], name="positions")
    rows = build.call("Expand", [row, t.caches["ids_shape"]], name="positions")
    return build.call("Reshape", [rows, build.constant([1, -1])], name="positions")


def _outputs(t: Translation, graph: Graph, options: GraphOptions) -> list[tuple[str, Value]]:
    """Results as [batch, sequence, ...] under their final names."""
    build = t.builder
    found = []
    for i, reference in enumerate(graph.outputs):
        value = t.tensor(t.resolve(reference))
        last = value.shape[-1]
        if len(value.shape) != 3 or value.shape[0] != 1 or not isinstance(last, int):
            raise UnsupportedModelError(f"output {reference.name!r} is not [1, tokens, features]")
        name = "logits" if last == options.vocab_size else "last_hidden_state"
        name = name if i == 0 else f"output_{i}"
        shape = build.call(
            "Concat", [t.caches["ids_shape"], build.constant([last])], axis=0, name=f"{name}_shape"
        )
        build.calls("Reshape", [value.name, shape], [name], name=name)
        found.append((name, Value(name, value.dtype, ("batch", "sequence", last))))
    return found


def _finish(
    t: Translation,
    graph: Graph,
    options: GraphOptions,
    caches: tuple[Cache, ...],
    inputs: list[str],
    outputs: list[tuple[str, Value]],
) -> OnnxGraph:
    from onnx import helper

    def info(name: str, dtype: torch.dtype, shape: tuple[int | str, ...]):
        return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape))

    total = "total" if caches else "sequence"
    graph_inputs = [info(name, torch.int64, ("batch", "sequence")) for name in inputs]
    graph_inputs.append(info(MASK, torch.int64, ("batch", total)))
    graph_outputs = [info(name, value.dtype, value.shape) for name, value in outputs]
    for cache in caches:
        for part, size in (("key", cache.key_size), ("value", cache.value_size)):
            past, present = past_name(cache.index, part), present_name(cache.index, part)
            graph_inputs.append(info(past, options.target, ("batch", cache.heads, "past", size)))
            graph_outputs.append(info(present, options.target, ("batch", cache.heads, "total", size)))
    used = {name for node in t.builder.nodes for name in node.input}
    constants = [c for c in t.builder.constants if c.name in used]
    proto = helper.make_graph(t.builder.nodes, graph.kind, graph_inputs, graph_outputs, initializer=constants)
    model = helper.make_model(
        proto,
        producer_name="qcompiler",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
    )
    operators: dict[str, int] = {}
    for node in t.builder.nodes:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    weights = tuple(weight for weight in t.builder.weights.values() if weight.name in used)
    return OnnxGraph(model, weights, caches, dict(sorted(operators.items())), tuple(sorted(t.notes)))
