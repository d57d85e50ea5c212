"""graph.json: decoded and checked; `program` executes it.

    {"schema": 1, "kind": "decoder",
     "inputs":  [{"name", "dtype", "shape": [int | "T" ...]}],
     "weights": [name ...],
     "nodes":   [{"name", "op", "args": [...], "kwargs": {...}, "dtype"?, "shape"?}],
     "outputs": [{"ref": name}]}

Arguments are JSON values; what JSON lacks is tagged: {"ref": node or input},
{"weight": name}, {"dtype": "bfloat16"}, {"device": "model"},
{"memory_format": "contiguous_format"}, {"layout": "strided"},
{"float": "inf" | "-inf" | "nan"}. Each op is looked up in `opset` and each
argument checked against the op's schema; text is never evaluated. A node may
only refer to nodes before it. Ops that write in place may do so only on values
that the graph itself made, except that `kv_append` and its like write the page
inputs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.opset import SYM_OPS, resolve
from qcompiler.runtime.tensorfile import DTYPES

SCHEMA = 1
MAX_BYTES = 64 << 20
MAX_DEPTH = 12
MAX_NODES = 200_000
MAX_ARGS = 4096
MAX_CREATED = 1 << 28  # elements of a tensor whose size stands literally in the graph

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
_KINDS = frozenset({"decoder", "encoder"})

DTYPE_BY_NAME = {str(d).removeprefix("torch."): d for d in (*DTYPES.values(), torch.complex64)}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}
# Arguments through which an op may write to a graph input.
_PAGE_WRITES = {
    "qcompiler.kv_append.default": ("k_pages", "v_pages"),
    "qcompiler.kv_append_quantized.default": ("k_pages", "v_pages", "k_scales", "v_scales"),
    "qcompiler.rotary_kv_append.default": ("k_pages", "v_pages"),
    "qcompiler.rotary_kv_append_quantized.default": ("k_pages", "v_pages", "k_scales", "v_scales"),
}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Ref:
    """A value of the graph: an input or the result of an earlier node."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A tensor of the artifact."""

    name: str


class ModelDevice:
    """Stands where a device argument stood; becomes the device the model is loaded on."""


MODEL_DEVICE = ModelDevice()


@dataclass(frozen=True)
class Input:
    """A graph input; `shape` has sizes and symbols; dtype "int" is a plain number."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass
class Node:
    """One call; `target` is the op to run, None for scalar functions.

    `roots` names the inputs, weights and nodes whose memory the result may share.
    """

    name: str
    op: str
    target: torch._ops.OpOverload | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None
    roots: frozenset[str] = frozenset()


@dataclass
class Graph:
    """A decoded graph. `written` names the roots (see `Node`) that some node writes in place."""

    kind: str
    inputs: list[Input]
    weights: list[str]
    nodes: list[Node]
    outputs: list[Ref]
    written: frozenset[str] = frozenset()


def decode(raw: Any, where: str = "graph.json") -> Graph:
    """Check a parsed graph.json and turn it into a `Graph`.

    Raises:
        ArtifactError: naming the node and the op.
    """
    top = _object(raw, where, required={"schema", "kind", "inputs", "weights", "nodes", "outputs"})
    if top["schema"] != SCHEMA or type(top["schema"]) is not int:
        raise newer_schema(where, top["schema"], SCHEMA)
    if not isinstance(top["kind"], str) or top["kind"] not in _KINDS:
        raise ArtifactError(f"{where}: kind {str(top['kind'])[:40]!r} is neither decoder nor encoder")
    inputs = [_input(where, i) for i in _list(top["inputs"], f"{where} inputs", MAX_ARGS)]
    weights = _list(top["weights"], f"{where} weights", MAX_NODES)
    if not all(isinstance(w, str) for w in weights) or len(set(weights)) != len(weights):
        raise ArtifactError(f"{where}: weights must be distinct names")
    decoder = _Decoder(where, {i.name for i in inputs}, set(weights))
    if len(decoder.known) != len(inputs):
        raise ArtifactError(f"{where}: two inputs have the same name")
    nodes = [decoder.node(n) for n in _list(top["nodes"], f"{where} nodes", MAX_NODES)]
    outputs = [
        decoder.value(o, f"{where}: output") for o in _list(top["outputs"], f"{where} outputs", MAX_ARGS)
    ]
    if not outputs or not all(isinstance(o, Ref) for o in outputs):
        raise ArtifactError(f"{where}: outputs must be references to nodes")
    return Graph(top["kind"], inputs, weights, nodes, outputs, frozenset(decoder.written))


def newer_schema(where: str, found: Any, known: int) -> ArtifactError:
    """The error for a schema version that this runtime does not read."""
    if type(found) is int and found > known:
        return ArtifactError(
            f"{where}: schema {found} is newer than this runtime reads ({known})",
            hint="Upgrade: pip install -U qcompiler",
        )
    return ArtifactError(f"{where}: schema {str(found)[:40]!r} is not one this runtime reads ({known})")


class _Decoder:
    def __init__(self, where: str, inputs: set[str], weights: set[str]):
        self.where = where
        self.known = set(inputs)
        self.weights = weights
        # For writes in place: what memory each value may share. Roots are input names, weights, own results.
        self.roots: dict[str, frozenset[str]] = {name: frozenset({f"input {name}"}) for name in inputs}
        self.written: set[str] = set()

    def node(self, raw: Any) -> Node:
        raw = _object(
            raw, f"{self.where}: node", required={"name", "op", "args"}, optional={"kwargs", "dtype", "shape"}
        )
        name, op = raw["name"], raw["op"]
        if not isinstance(name, str) or not _NODE_NAME.fullmatch(name) or name in self.known:
            raise ArtifactError(f"{self.where}: node name {str(name)[:80]!r} is malformed or taken")
        if not isinstance(op, str):
            raise ArtifactError(f"{self.where}: node {name!r} has no op")
        where = f"{self.where}: node {name!r} ({op[:80]})"
        target = resolve(op, where)
        args = tuple(self.value(a, where) for a in _list(raw["args"], where, MAX_ARGS))
        kwargs_raw = _object(raw.get("kwargs", {}), where)
        kwargs = {k: self.value(v, where) for k, v in kwargs_raw.items()}
        if target is None:
            count = SYM_OPS[op][0]
            if kwargs or len(args) != count or not all(_is_scalar_arg(a) for a in args):
                raise ArtifactError(f"{where}: takes exactly {count} references or numbers")
            self.roots[name] = frozenset().union(*(self.roots[a.name] for a in args if isinstance(a, Ref)))
        else:
            bound = _bind(target, args, kwargs, where)
            self._check_writes(name, target, bound, where)
            _check_creation(op, bound, where)
        self.known.add(name)
        dtype = raw.get("dtype")
        if dtype is not None and not _known_dtype(dtype, "int", "float", "bool"):
            raise ArtifactError(f"{where}: dtype {str(dtype)[:40]!r} is not known")
        return Node(name, op, target, args, kwargs, dtype, _shape(raw.get("shape"), where), self.roots[name])

    def value(self, raw: Any, where: str, depth: int = 0) -> Any:
        if raw is None or isinstance(raw, (bool, str)):
            return raw
        if isinstance(raw, int):
            if not -(1 << 63) <= raw < 1 << 63:
                raise ArtifactError(f"{where}: number {str(raw)[:40]} does not fit 64 bits")
            return raw
        if isinstance(raw, float):
            if not math.isfinite(raw):
                raise ArtifactError(f"{where}: number is not finite")
            return raw
        if isinstance(raw, list):
            if depth >= 4 or len(raw) > MAX_ARGS:
                raise ArtifactError(f"{where}: argument lists are nested too deeply or too long")
            return tuple(self.value(v, where, depth + 1) for v in raw)
        if isinstance(raw, dict) and len(raw) == 1:
            (tag, value) = next(iter(raw.items()))
            if isinstance(value, str):
                if tag == "ref":
                    if value not in self.known:
                        raise ArtifactError(f"{where}: refers to {value[:80]!r}, which no earlier node makes")
                    return Ref(value)
                if tag == "weight":
                    if value not in self.weights:
                        raise ArtifactError(f"{where}: weight {value[:80]!r} is not listed")
                    return Weight(value)
                if tag == "dtype" and value in DTYPE_BY_NAME:
                    return DTYPE_BY_NAME[value]
                if tag == "device" and value == "model":
                    return MODEL_DEVICE
                if tag == "memory_format" and value in _MEMORY_FORMATS:
                    return _MEMORY_FORMATS[value]
                if tag == "layout" and value == "strided":
                    return torch.strided
                if tag == "float" and value in _FLOATS:
                    return _FLOATS[value]
        raise ArtifactError(f"{where}: argument {str(raw)[:80]} is not understood")

    def _check_writes(
        self, name: str, target: torch._ops.OpOverload, bound: dict[str, Any], where: str
    ) -> None:
        shared: frozenset[str] = frozenset()
        for argument in target._schema.arguments:
            alias = argument.alias_info
            if alias is None or argument.name not in bound:
                continue
            roots = self._roots_of(bound[argument.name])
            shared |= roots
            if alias.is_write:
                self.written |= roots
                paged = argument.name in _PAGE_WRITES.get(str(target), ())
                foreign = {r for r in roots if r.startswith(("input ", "weight "))}
                if foreign and not (paged and all(r.startswith("input ") for r in foreign)):
                    raise ArtifactError(f"{where}: writes in place to {min(foreign)}, which is not its own")
        self.roots[name] = shared or frozenset({f"node {name}"})

    def _roots_of(self, value: Any) -> frozenset[str]:
        if isinstance(value, Ref):
            return self.roots[value.name]
        if isinstance(value, Weight):
            return frozenset({f"weight {value.name}"})
        if isinstance(value, tuple):
            return frozenset().union(*(self._roots_of(v) for v in value))
        return frozenset()


def bind(node: Node) -> dict[str, Any]:
    """The node's arguments by their names in the op's schema."""
    if node.target is None:
        raise ArtifactError(f"node {node.name!r} ({node.op}) is a scalar function and has no schema")
    return _bind(node.target, node.args, node.kwargs, f"node {node.name!r} ({node.op})")


def _bind(
    target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
) -> dict[str, Any]:
    declared = target._schema.arguments
    positional = [a for a in declared if not a.kwarg_only]
    if len(args) > len(positional):
        raise ArtifactError(f"{where}: {len(args)} arguments, but the op takes {len(positional)}")
    bound = {a.name: value for a, value in zip(positional, args, strict=False)}
    names = {a.name for a in declared}
    for key, value in kwargs.items():
        if key not in names or key in bound:
            raise ArtifactError(f"{where}: argument {key[:60]!r} is unknown or given twice")
        bound[key] = value
    for argument in declared:
        if argument.name in bound:
            if not _accepts(argument.real_type, bound[argument.name]):
                raise ArtifactError(
                    f"{where}: argument {argument.name!r} is not of type {argument.real_type}"
                )
        elif not argument.has_default_value():
            raise ArtifactError(f"{where}: argument {argument.name!r} is missing")
    return bound


def _accepts(kind: Any, value: Any) -> bool:
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _accepts(kind.getElementType(), value)
    if name == "ListType":
        element = kind.getElementType()
        if isinstance(value, tuple):
            return all(_accepts(element, v) for v in value)
        # aten lets one number stand for a list of numbers
        return isinstance(value, Ref) or (_accepts(element, value) and element.kind() != "TensorType")
    if name == "TensorType":  # torch takes a number where it promotes one, e.g. mul.Tensor(x, 0.5)
        return isinstance(value, (Ref, Weight)) or type(value) in (int, float, bool)
    if isinstance(value, Ref):  # a size computed by the graph
        return name in ("IntType", "SymIntType", "FloatType", "NumberType", "BoolType")
    if name in ("IntType", "SymIntType"):
        return type(value) is int
    if name in ("FloatType", "NumberType"):
        return type(value) in (int, float) or (name == "NumberType" and type(value) is bool)
    if name == "BoolType":
        return type(value) is bool
    if name == "StringType":
        return isinstance(value, str) and len(value) <= 64
    expected = {
        "ScalarTypeType": torch.dtype,
        "LayoutType": torch.layout,
        "MemoryFormatType": torch.memory_format,
        "DeviceObjType": ModelDevice,
    }.get(name)
    return expected is not None and isinstance(value, expected)


# Ops whose result's size is what the graph says rather than what its inputs are.
_CREATES = frozenset(
    {
        "aten.arange.default",
        "aten.arange.start",
        "aten.arange.start_step",
        "aten.empty.memory_format",
        "aten.full.default",
        "aten.histc.default",
        "aten.new_empty.default",
        "aten.new_full.default",
        "aten.new_ones.default",
        "aten.new_zeros.default",
        "aten.one_hot.default",
        "aten.ones.default",
        "aten.repeat.default",
        "aten.repeat_interleave.self_int",
        "aten.tile.default",
        "aten.zeros.default",
    }
)


def _check_creation(op: str, bound: dict[str, Any], where: str) -> None:
    if op not in _CREATES:
        return
    product = 1
    for value in bound.values():
        for v in value if isinstance(value, tuple) else (value,):
            if type(v) in (int, float):
                product *= max(1, abs(int(v)))
    if product > MAX_CREATED:
        raise ArtifactError(f"{where}: makes a tensor of {product} elements, more than {MAX_CREATED}")


def _known_dtype(name: Any, *others: str) -> bool:
    return isinstance(name, str) and (name in DTYPE_BY_NAME or name in others)


def _is_scalar_arg(value: Any) -> bool:
    return isinstance(value, Ref) or type(value) in (int, float, bool)


def _input(where: str, raw: Any) -> Input:
    raw = _object(raw, f"{where}: input", required={"name", "dtype", "shape"})
    name, dtype = raw["name"], raw["dtype"]
    if not isinstance(name, str) or not _NODE_NAME.fullmatch(name):
        raise ArtifactError(f"{where}: input name {str(name)[:80]!r} is malformed")
    if not _known_dtype(dtype, "int"):
        raise ArtifactError(f"{where}: input {name!r} has unknown dtype {str(dtype)[:40]!r}")
    shape = _shape(raw["shape"], f"{where}: input {name!r}")
    return Input(name, dtype, shape or ())


def _shape(raw: Any, where: str) -> tuple[int | str, ...] | None:
    """Sizes are numbers or plain identifiers; an expression has no meaning here and is refused."""
    if raw is None:
        return None
    for size in _list(raw, f"{where} shape", 16):
        number = type(size) is int and 0 <= size < 1 << 48
        if not number and not (isinstance(size, str) and _SYMBOL.fullmatch(size)):
            raise ArtifactError(f"{where}: size {str(size)[:40]!r} is neither a number nor a plain name")
    return tuple(raw)


def _list(raw: Any, where: str, limit: int) -> list[Any]:
    if not isinstance(raw, list) or len(raw) > limit:
        raise ArtifactError(f"{where}: must be a list of at most {limit}")
    return raw


def _object(
    raw: Any, where: str, *, required: set[str] | None = None, optional: set[str] | None = None
) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where}: must be an object")
    if required is not None:
        missing, extra = required - set(raw), set(raw) - required - (optional or set())
        if missing or extra:
            what = f"lacks {min(missing)!r}" if missing else f"has unknown field {min(extra)[:60]!r}"
            raise ArtifactError(f"{where}: {what}")
    return raw
