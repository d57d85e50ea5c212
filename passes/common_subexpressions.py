"""Computes equal expressions once: what each layer derives from the same positions, for example."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx import GraphModule

from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import Node, is_mutated, is_tensor


class MergeCommonSubexpressions(Pass):
    """Calls of the same pure op with the same arguments become one."""

    name = "merge_common_subexpressions"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        seen: dict[Any, Node] = {}
        for node in list(gm.graph.nodes):
            if node.op == "get_attr":
                key: Any = ("get_attr", node.target)
            elif node.op == "call_function" and not node.is_impure():
                key = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
            else:
                continue
            first = seen.setdefault(key, node)
            if first is node:
                continue
            if is_tensor(node) and (is_mutated(node) or is_mutated(first)):
                result.skip(node, f"it equals {first.name}, but one of them is written to in place")
                continue
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            result.matched += 1


def _key(item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return (type(item).__name__, *map(_key, item))
    if isinstance(item, (int, float, bool)):
        return (type(item).__name__, item)  # 1, 1.0 and True are equal but not the same argument
    return item if isinstance(item, fx.Node) else (type(item).__name__, str(item))
