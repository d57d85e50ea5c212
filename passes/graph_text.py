"""A graph as text: one node a line with dtype, shape and the module it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import GraphModule

from qcompiler.passes.graph_utils import Node, module_path

if TYPE_CHECKING:
    from qcompiler.passes.base import PassResult


def graph_text(gm: GraphModule, result: PassResult | None = None) -> str:
    """Readable text of `gm.graph`.

    Args:
        gm: The graph.
        result: If given, its counts and reasons stand at the top.
    """
    lines = []
    if result is not None:
        lines.append(
            f"# {result.name}: {result.matched} matched, {result.nodes_before} → {result.nodes_after} nodes, "
            f"{result.seconds:.3f} s"
        )
        if result.launches_saved:
            saved = f" and {result.bytes_saved} bytes of activations a token" if result.bytes_saved else ""
            lines.append(f"# saves {result.launches_saved} launches{saved}")
        lines += [f"# skipped {node}: {reason}" for node, reason in result.skipped]
    module = ""
    for node in gm.graph.nodes:
        path = module_path(node)
        if node.op == "call_function" and path != module:
            lines.append(f"# {path}")
            module = path
        lines.append(_line(node))
    return "\n".join(lines) + "\n"


def _line(node: Node) -> str:
    args = ", ".join([*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())])
    kind = f": {_kind(node.meta['val'])}" if "val" in node.meta else ""
    if node.op == "output":
        return f"return {args}"
    if node.op in ("placeholder", "get_attr"):
        return f"%{node.name}{kind} = {node.op} {node.target}"
    return f"%{node.name}{kind} = {_target(node.target)}({args})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return repr(value)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_kind, value)) + ")"
    return str(value)
