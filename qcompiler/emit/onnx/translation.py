"""The state of one translation: what each value of our graph is called in the ONNX graph, and its type.

A translator (one function per op, see `operators`) takes this and the call's arguments by their
schema names, adds nodes, and returns what the call gives: a `Value`, a list of them, or a number.
Sizes known beforehand are Python numbers; others are int64 values of shape [1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qcompiler.emit.onnx.builder import ONNX_TYPES, GraphBuilder
from qcompiler.kernels.errors import UnsupportedModelError
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.runtime.graph import DTYPE_BY_NAME, Node, Ref, Weight

Shape = tuple[int | str, ...]
# Beyond this a 16-bit weight stays so in the file, and is cast when the model is loaded.
_CAST_IN_GRAPH = 1 << 16


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph: its name, dtype, and shape with symbols where sizes are not known."""

    name: str
    dtype: torch.dtype
    shape: Shape


@dataclass
class Translation:
    """See the top of this file.

    Attributes:
        builder: The ONNX graph.
        tensors: Dtype and shape of every stored tensor.
        read: Gives a stored tensor; called only when weights are written.
        compute: Activation dtype of the artifact.
        target: Activation dtype of the ONNX graph, which takes its place.
        accuracy_level: Of MatMulNBits: 0 computes with activations as they are, 4 rounds them to int8.
        plain_attention: Say attention in basic operators even where GroupQueryAttention could.
        float_zeros: Zero points of MatMulNBits as numbers; else they are codes.
        dry: There are no weights yet: only whether the graph can be said is of interest.
        values: By node or input name.
        caches: What attention keeps between calls: pages, masks.
        notes: What the user should know of the result.
    """

    builder: GraphBuilder
    tensors: Mapping[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    compute: torch.dtype
    target: torch.dtype
    accuracy_level: int = 0
    plain_attention: bool = False
    float_zeros: bool = False
    dry: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    caches: dict[Any, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    node: Node = field(init=False)

    def map_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The ONNX graph's dtype for a dtype of ours."""
        return self.target if dtype == self.compute else dtype

    def resolve(self, argument: Any) -> Any:
        """An argument as translators see it: references become values, lists are resolved inside."""
        if isinstance(argument, Ref):
            return self.values[argument.name]
        if isinstance(argument, tuple):
            return [self.resolve(item) for item in argument]
        return argument

    def refuse(self, why: str) -> UnsupportedModelError:
        """The error for a call that ONNX cannot say."""
        return UnsupportedModelError(
            f"graph node {self.node.name!r} ({self.node.op}): {why}", hint="Emit the artifact alone."
        )

    # What calls give.

    def result(self, name: str, dtype: torch.dtype | None = None, shape: Shape | None = None) -> Value:
        """The value of the current node, with the dtype and shape that our graph says it has."""
        if dtype is None:
            declared = self.node.dtype
            if declared is None or declared not in DTYPE_BY_NAME:
                raise self.refuse("its dtype is not recorded")
            dtype = self.map_dtype(DTYPE_BY_NAME[declared])
        if shape is None:
            if self.node.shape is None:
                raise self.refuse("its shape is not recorded")
            shape = self.node.shape
        return Value(name, dtype, shape)

    def call(self, op: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """Add an ONNX node named after the current one."""
        return self.builder.call(op, inputs, domain=domain, name=self.node.name, **attributes)

    # Operands.

    def tensor(self, argument: Any, dtype: torch.dtype | None = None) -> Value:
        """A tensor operand, cast if `dtype` says so; numbers become scalars of that dtype."""
        if isinstance(argument, Weight):
            value = self.weight(argument.name)
        elif isinstance(argument, Value):
            value = argument
        elif isinstance(argument, (bool, int, float)):
            dtype = dtype or torch.get_default_dtype()
            return Value(self.builder.constant(argument, dtype), dtype, ())
        else:
            raise self.refuse(f"operand {argument!r} is not a tensor")
        return value if dtype is None else self.cast(value, dtype)

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """The value in another dtype."""
        if value.dtype == dtype:
            return value
        return replace(value, name=self.call("Cast", [value.name], to=ONNX_TYPES[dtype]), dtype=dtype)

    def weight(self, name: str) -> Value:
        """A stored tensor in the dtype that the graph computes with."""
        spec = self.tensors[name]
        wanted = self.map_dtype(spec.dtype)
        if self.narrower(name) and spec.nbytes > _CAST_IN_GRAPH:
            key = ("cast", name)
            if key not in self.caches:
                self.caches[key] = self.cast(self.stored(name), wanted)
            return self.caches[key]
        self.builder.weight(name, wanted, spec.shape, lambda: self.read(name).to(wanted))
        return Value(name, wanted, tuple(spec.shape))

    def narrower(self, name: str) -> bool:
        """Whether a tensor is stored in fewer bytes than the graph computes with."""
        dtype = self.tensors[name].dtype
        return dtype.itemsize < self.map_dtype(dtype).itemsize

    def stored(self, name: str) -> Value:
        """A stored tensor in its own dtype."""
        spec = self.tensors[name]
        label = name if self.map_dtype(spec.dtype) == spec.dtype else f"{name}.stored"
        self.builder.weight(label, spec.dtype, spec.shape, lambda: self.read(name))
        return Value(label, spec.dtype, tuple(spec.shape))

    # Sizes.

    def size(self, value: Any) -> str:
        """A size as an int64 tensor of shape [1]."""
        if isinstance(value, Value):
            return value.name if value.shape == (1,) else self.call("Reshape", [value.name, self.ints([1])])
        return self.ints([int(value)])

    def ints(self, values: Sequence[int]) -> str:
        """Constant int64 values, e.g. axes."""
        return self.builder.constant(list(values), torch.int64)

    def shape_of(self, sizes: Sequence[Any]) -> str:
        """Sizes, known and computed, as one int64 tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints([int(size) for size in sizes])
        return self.call("Concat", [self.size(size) for size in sizes], axis=0)

    def reshape(self, value: Value, sizes: Sequence[Any], shape: Shape) -> Value:
        """Reshape to `sizes`; when at most one entry of `shape` is unknown, no size is computed at all."""
        unknown = [size for size in shape if isinstance(size, str)]
        if len(unknown) <= 1:
            sizes = [-1 if isinstance(size, str) else size for size in shape]
        if tuple(shape) == value.shape and len(unknown) <= 1:
            return value
        return Value(self.call("Reshape", [value.name, self.shape_of(sizes)]), value.dtype, tuple(shape))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Permute the axes."""
        if list(order) == list(range(len(order))):
            return value
        name = self.call("Transpose", [value.name], perm=list(order))
        return Value(name, value.dtype, tuple(value.shape[i] for i in order))

    def slice(self, value: Value, axis: int, start: int, end: int, step: int = 1) -> Value:
        """A slice with known bounds of an axis of known size."""
        size = value.shape[axis]
        name = self.call(
            "Slice", [value.name, self.ints([start]), self.ints([end]), self.ints([axis]), self.ints([step])]
        )
        shape = list(value.shape)
        if isinstance(size, int):
            shape[axis] = len(range(*slice(start, end, step).indices(size)))
        return Value(name, value.dtype, tuple(shape))
