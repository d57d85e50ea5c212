"""Reads a call of a weight-storing op back: which format, which settings, which tensors.

The inverse of `Format.op_call`, for whoever finds such a call in a graph: the
pass that lays linears side by side, the emitter that lists an artifact's
layers, the runtime that checks tensors before a kernel reads them. Arguments
come by their schema names and may be graph nodes, JSON values or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import AdditiveSpec
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.kernels.formats.body_tail import BodyTailSpec
from qcompiler.kernels.formats.int8_channel import Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import Lut4Spec
from qcompiler.kernels.formats.plugins import plugin_of
from qcompiler.kernels.library import registered_ops

Call = Mapping[str, Any]
Describe = Callable[[Any], TensorSpec]
_Reader = tuple[tuple[str, ...], Callable[[Call, dict[str, TensorSpec]], tuple[Any, int]]]


@dataclass(frozen=True)
class StoredWeight:
    """The weight that a call reads.

    Attributes:
        spec: The format's settings; `spec.name` is the format.
        tensors: The format's parts by name, as the call holds them.
        in_features: Columns.
        experts: Parts of equal size that the rows are divided among, as far as the tensors tell.
    """

    spec: Any
    tensors: dict[str, Any]
    in_features: int
    experts: int = 1


def stored_weight(op: str, call: Call, describe: Describe) -> StoredWeight | None:
    """The quantized weight that a call reads, or None if the op reads none.

    Args:
        op: Name of the op without namespace and overload, e.g. "linear_affine".
        call: Its arguments by schema name.
        describe: Shape and dtype of an argument that is a tensor.

    Raises:
        InvalidInputError: Settings that no format has, or that are not numbers.
    """
    reader = _READERS.get(op) or _plugin_reader(op)
    if reader is None:
        return None
    names, read = reader
    tensors = {name: call[name] for name in names if call.get(name) is not None}
    optional = _OPTIONAL if op in _READERS else frozenset(names)  # a plug-in's own specs tell what it needs
    absent = [name for name in names if name not in tensors and name not in optional]
    if absent:
        raise InvalidInputError(f"{op} has no {absent[0]!r}")
    parts = {name: describe(value) for name, value in tensors.items()}
    spec, in_features = read(call, parts)
    own = parts.get("part_rows") if op in GROUPED_LINEARS else None
    return StoredWeight(spec, tensors, in_features, own.shape[0] if own is not None and own.shape else 1)


def is_linear_op(op: str | None) -> bool:
    """True if `qcompiler::<op>`, ours or a plug-in's, stands for `linear(x, weight, bias)`."""
    return op is not None and (op in QUANTIZED_LINEARS or _plugin_reader(op) is not None)


def _plugin_reader(op: str) -> _Reader | None:
    known = registered_ops().get(op)
    if known is None or known.reference.__module__.startswith("qcompiler."):
        return None
    format_ = plugin_of(op)
    return None if format_ is None else (format_.parts, partial(format_.read_call, op))


def _affine(columns: str) -> Callable[[Call, dict[str, TensorSpec]], tuple[Any, int]]:
    def read(call: Call, parts: dict[str, TensorSpec]) -> tuple[AffineSpec, int]:
        spec = AffineSpec(_integer(call, "bits"), _integer(call, "group_size"), parts["scales"].dtype)
        return spec, _integer(call, columns)

    return read


def _lut4(call: Call, parts: dict[str, TensorSpec]) -> tuple[Lut4Spec, int]:
    spec = Lut4Spec(call["quant_type"], _integer(call, "block_size"), "nested_absmax" in parts)
    return spec, _integer(call, "in_features")


def _int8(call: Call, parts: dict[str, TensorSpec]) -> tuple[Int8ChannelSpec, int]:
    codes = parts["codes"]
    if len(codes.shape) != 2:
        raise InvalidInputError(f"codes are {list(codes.shape)}, not a matrix")
    return Int8ChannelSpec(call.get("threshold"), parts["scales"].dtype), codes.shape[1]


def _additive(call: Call, parts: dict[str, TensorSpec]) -> tuple[AdditiveSpec, int]:
    shape = parts["codebooks"].shape
    if len(shape) != 4:
        raise InvalidInputError(f"codebooks are {list(shape)}, not [sets, codebooks, codewords, group]")
    return AdditiveSpec(shape[1], _integer(call, "bits"), shape[3]), _integer(call, "in_features")


def _body_tail(call: Call, parts: dict[str, TensorSpec]) -> tuple[BodyTailSpec, int]:
    fraction = call.get("tail_fraction")
    if type(fraction) is not float:
        raise InvalidInputError(f"tail_fraction is {fraction!r}, not a number")
    bits, group_size, tail_bits = (_integer(call, name) for name in ("bits", "group_size", "tail_bits"))
    spec = BodyTailSpec(bits, group_size, fraction, tail_bits, parts["scales"].dtype)
    return spec, _integer(call, "in_features")


def _integer(call: Call, name: str) -> int:
    value = call.get(name)
    if type(value) is not int:
        raise InvalidInputError(f"{name} is {value!r}, not a number")
    return value


_AFFINE_PARTS = ("low", "high", "scales", "zeros")
_LUT4_PARTS = ("codes", "absmax", "nested_absmax", "nested_offset", "part_rows")
_OPTIONAL = frozenset({"high", "nested_absmax", "nested_offset", "part_rows"})
_READERS: dict[str, _Reader] = {
    "linear_affine": (_AFFINE_PARTS, _affine("in_features")),
    "linear_affine_gated": (_AFFINE_PARTS, _affine("in_features")),
    "grouped_linear_affine": (_AFFINE_PARTS, _affine("in_features")),
    "grouped_linear_lut4": (_LUT4_PARTS, _lut4),
    "grouped_linear_int8": (("codes", "scales"), _int8),
    "embedding_affine": (_AFFINE_PARTS, _affine("embedding_dim")),
    "linear_lut4": (_LUT4_PARTS, _lut4),
    "linear_int8": (("codes", "scales"), _int8),
    "linear_llm_int8": (("codes", "scales"), _int8),
    "linear_body_tail": ((*_AFFINE_PARTS, "tail", "tail_scales"), _body_tail),
    "linear_additive": (("codes", "codebooks", "scales", "rows"), _additive),
}

# Our ops that stand for `linear(x, weight, bias)` over a quantized weight; see `is_linear_op`.
QUANTIZED_LINEARS = frozenset(
    {
        "linear_affine",
        "linear_body_tail",
        "linear_lut4",
        "linear_int8",
        "linear_llm_int8",
        "linear_additive",
    }
)

# Ops that stand for `grouped_linear(x, weight, offsets, bias)` over a quantized weight.
GROUPED_LINEARS = frozenset({"grouped_linear_affine", "grouped_linear_lut4", "grouped_linear_int8"})
