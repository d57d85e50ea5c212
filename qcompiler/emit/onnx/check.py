"""What ONNX can say, asked before any work: formats by settings, graphs by a translation without weights."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.kernels.formats.int8_channel import Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import Lut4Spec

if TYPE_CHECKING:
    from qcompiler.emit.onnx.graph import OnnxGraph
    from qcompiler.plan import CompilePlan

AFFINE_BITS = (2, 4, 8)
EMBEDDING_BITS = (4, 8)
CHOICES = (
    "ONNX has operators for hqq, rtn and gptq with 2, 4 or 8 bits, bnb with 4 or 8, eetq with 8, "
    "and --method none."
)


def require_onnx() -> None:
    """Raise `InvalidInputError` unless the onnx package is there."""
    if find_spec("onnx") is None:
        raise InvalidInputError(
            "emitting ONNX needs the package onnx", hint='Install it: pip install "qcompiler[onnx]"'
        )


def format_obstacle(spec: Any) -> str | None:
    """Why ONNX has no operator for weights stored like this, or None."""
    if isinstance(spec, AffineSpec):
        return None if spec.bits in AFFINE_BITS else f"{spec.bits}-bit codes"
    if isinstance(spec, (Lut4Spec, Int8ChannelSpec)):
        return None
    return f"the format {getattr(spec, 'name', spec)!r}"


def check_formats(stored: Iterable[tuple[str, Any]]) -> None:
    """Refuse formats that ONNX cannot say.

    Args:
        stored: What is stored so (an option or a layer's name), and the format's settings.

    Raises:
        InvalidInputError: Names the first and the choices that would do.
    """
    for name, spec in stored:
        obstacle = format_obstacle(spec)
        if obstacle is not None:
            raise InvalidInputError(f"{name}: ONNX has no operator for {obstacle}", hint=CHOICES)


def check_plan(plan: CompilePlan) -> OnnxGraph:
    """Translate the graph of a planned artifact without its weights.

    Raises:
        InvalidInputError: ONNX cannot say a format or an op; names it.
    """
    import copy

    import torch

    from qcompiler.emit.graph_json import graph_to_json
    from qcompiler.emit.onnx.graph import GraphOptions, translate_graph
    from qcompiler.passes import PassManager, lowering_passes
    from qcompiler.runtime.graph import decode

    check_formats((layer.name, layer.spec) for layer in plan.layers)
    lowered = copy.deepcopy(plan.quantized_graph)
    PassManager(lowering_passes(plan.captured.kind)).run(lowered)
    tensors = {
        str(node.target): TensorSpec(tuple(node.meta["val"].shape), node.meta["val"].dtype)
        for node in lowered.graph.nodes
        if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
    }
    graph = decode(graph_to_json(lowered, kind=plan.captured.kind))
    return translate_graph(
        graph, tensors, None, GraphOptions(plan.dtype, vocab_size=plan.captured.vocab_size)
    )
