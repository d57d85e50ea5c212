"""Writes an ONNX model: `model.onnx` and its weights in `model.onnx.data` beside it, one weight at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.emit.onnx.builder import ONNX_TYPES, Initializer, numpy_of
from qcompiler.emit.onnx.graph import OnnxGraph
from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from onnx import TensorProto

MODEL = "model.onnx"
DATA = "model.onnx.data"
# onnxruntime maps the file and uses large weights in place, which takes whole pages.
_PAGE, _LARGE, _ALIGNMENT = 4096, 1 << 20, 64


def write_model(folder: Path, graph: OnnxGraph) -> int:
    """Write model and weights into a folder; files are fsynced.

    Returns:
        Bytes written.

    Raises:
        InvalidInputError: a weight is not what was promised, or the model does not pass onnx.checker.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    places: dict[str, tuple[int, int]] = {}
    with (folder / DATA).open("xb") as f:
        for weight in graph.weights:
            if weight.data not in places:
                places[weight.data] = _append(f, weight)
            model.graph.initializer.append(_external(weight, *places[weight.data]))
        f.flush()
        os.fsync(f.fileno())
        size = f.tell()
    text = model.SerializeToString(deterministic=True)
    with (folder / MODEL).open("xb") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    try:
        onnx.checker.check_model(str(folder / MODEL), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InvalidInputError(f"{MODEL}: onnx.checker refuses it: {str(error).splitlines()[0]}") from error
    return size + len(text)


def _append(f, weight: Initializer) -> tuple[int, int]:
    tensor = weight.make()
    if tensor.dtype != weight.dtype or tensor.nbytes != weight.nbytes:
        raise InvalidInputError(
            f"onnx: weight {weight.name!r} is {tensor.dtype} {list(tensor.shape)}, "
            f"not {weight.dtype} {list(weight.shape)}"
        )
    f.write(b"\0" * (-f.tell() % (_PAGE if tensor.nbytes >= _LARGE else _ALIGNMENT)))
    offset = f.tell()
    f.write(numpy_of(tensor).data)
    return offset, tensor.nbytes


def _external(weight: Initializer, offset: int, length: int) -> TensorProto:
    from onnx import TensorProto

    proto = TensorProto(
        name=weight.name,
        data_type=ONNX_TYPES[weight.dtype],
        dims=weight.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", DATA), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto
