"""Every operator of ours that ONNX can say, and who translates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.emit.onnx import attention, layers, pointwise, quantized, shapes
from qcompiler.emit.onnx.translation import Translation
from qcompiler.kernels.errors import UnsupportedModelError
from qcompiler.runtime.graph import Node, bind

OPERATORS: dict[str, Callable[[Translation, Mapping[str, Any]], Any]] = {
    **pointwise.OPERATORS,
    **shapes.OPERATORS,
    **layers.OPERATORS,
    **quantized.OPERATORS,
    **attention.OPERATORS,
}


def translate(t: Translation, node: Node) -> None:
    """Add the ONNX nodes of one of ours.

    Raises:
        UnsupportedModelError: ONNX cannot say it; names node and op.
    """
    t.node = node
    translator = OPERATORS.get(node.op)
    if translator is None:
        raise UnsupportedModelError(
            f"graph node {node.name!r}: ONNX emission does not know {node.op}",
            hint="Emit the artifact alone.",
        )
    if node.target is None:
        call = dict(zip("ab", node.args, strict=False))
    else:
        call = bind(node)
    t.values[node.name] = translator(t, {name: t.resolve(value) for name, value in call.items()})
