"""Collects the nodes and initializers of one ONNX graph.

Small constants are kept in the model file. Weights are promises: shape, dtype, and a function that
makes the array when it is written, so that translating a graph reads no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

OPSET = 23  # RMSNormalization and RotaryEmbedding
CONTRIB = "com.microsoft"  # the operators of onnxruntime: MatMulNBits, GroupQueryAttention ...
IR_VERSION = 11

# TensorProto.DataType by torch dtype.
ONNX_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


@dataclass(frozen=True)
class Initializer:
    """A weight to be written.

    Attributes:
        name: Its name in the graph.
        dtype: Its type.
        shape: Its shape; the array's may differ as long as the elements are as many.
        make: Gives the tensor; called once.
        data: Identifies the bytes: initializers with equal `data` share them in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    data: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class GraphBuilder:
    """The graph under construction: nodes in order, constants, weights."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.weights: dict[str, Initializer] = {}
        self._constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def call(
        self, op: str, inputs: Sequence[str], *, domain: str = "", name: str | None = None, **attributes: Any
    ) -> str:
        """Add a node with one output, and return the output's name."""
        return self.calls(op, inputs, 1, domain=domain, name=name, **attributes)[0]

    def calls(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str],
        *,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Add a node; `outputs` is their number, or their names with "" for one that is not wanted."""
        from onnx import helper

        self._count += 1
        label = f"{name or op.lower()}_{self._count}"
        if isinstance(outputs, int):
            outputs = [label] if outputs == 1 else [f"{label}_{i}" for i in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=label, domain=domain, **given)
        )
        return list(outputs)

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> str:
        """The name of a small constant; equal ones are made once."""
        from onnx import numpy_helper

        tensor = torch.as_tensor(value, dtype=dtype)
        array = numpy_of(tensor)
        key = (str(dtype), tuple(tensor.shape), array.tobytes())
        name = self._constant_names.get(key)
        if name is None:
            name = f"constant_{len(self.constants)}"
            proto = numpy_helper.from_array(array, name)
            if dtype == torch.bfloat16:
                proto.data_type = ONNX_TYPES[dtype]
            self.constants.append(proto)
            self._constant_names[key] = name
        return name

    def weight(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int],
        make: Callable[[], torch.Tensor],
        data: str | None = None,
    ) -> str:
        """Promise a weight; the same name twice is the same weight.

        Raises:
            InvalidInputError: the name was promised with another shape or dtype.
        """
        known = self.weights.get(name)
        if known is None:
            self.weights[name] = Initializer(name, dtype, tuple(shape), make, data or name)
        elif (known.dtype, known.shape) != (dtype, tuple(shape)):
            raise InvalidInputError(f"onnx: tensor {name!r} is used as {known.shape} and as {tuple(shape)}")
        return name


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes as an array; numpy has no bfloat16, which comes as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
