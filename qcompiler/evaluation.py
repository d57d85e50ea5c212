"""Runs a captured graph over a text with its weights streamed: read, used, let go.

The whole evaluation text goes through one node at a time, so that each weight
is read once however large the model is; only the part behind the choice of
rows (the output head) is run in row chunks, since logits over a large
vocabulary are the largest activation by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

FetchWeight = Callable[[str], torch.Tensor]
ROWS_INPUT = "logits_rows"


class StreamedProgram:
    """An FX graph whose parameters are fetched by name when a node needs them.

    Args:
        graph: Graph with placeholders, `get_attr` weights (meta or real) and one output; the placeholder
            `logits_rows` chooses the rows that the output is wanted for.
        fetch: Weight by attribute name, on `device`; called once per use, nothing is kept.
        device: Where the nodes run; device arguments burnt into the graph are replaced by it.
    """

    def __init__(self, graph: GraphModule, fetch: FetchWeight, device: torch.device):
        self._fetch = fetch
        self._device = device
        self._nodes = list(graph.graph.nodes)
        self._per_chunk = _depend_on_rows(self._nodes)
        self._last_use = _last_uses(self._nodes, self._per_chunk)

    @torch.inference_mode()
    def logits(
        self,
        inputs: dict[str, Any],
        rows: Sequence[torch.Tensor],
        on_node: Callable[[], None] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield logits [r, vocabulary] for each of the given row sets.

        Args:
            inputs: Placeholder values by name, less `logits_rows`.
            rows: Sets of token positions, int64 [r] each, whose logits are wanted together.
            on_node: Called after each node of the streamed part.
        """
        env: dict[Node, Any] = {}
        for node in self._nodes:
            if node in self._per_chunk:
                continue
            self._execute(node, env, inputs)
            self._release(node, env)
            if on_node is not None:
                on_node()
        for part in rows:
            chunk_env = dict(env)
            for node in self._per_chunk:
                self._execute(node, chunk_env, {ROWS_INPUT: part})
                if node.op == "output":
                    logits = chunk_env[node]
                    logits = logits[0] if isinstance(logits, tuple | list) else logits
                    yield logits.reshape(part.numel(), -1)

    def node_count(self) -> int:
        """Nodes of the streamed part, for progress."""
        return len(self._nodes) - len(self._per_chunk)

    def _execute(self, node: Node, env: dict[Node, Any], inputs: dict[str, Any]) -> None:
        if node.op == "placeholder":
            env[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            env[node] = self._fetch(str(node.target))
        else:
            args = map_aggregate(node.args, lambda a: self._value(a, env))
            if node.op == "output":
                env[node] = args[0]
                return
            kwargs = map_aggregate(node.kwargs, lambda a: self._value(a, env))
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, argument: Any, env: dict[Node, Any]) -> Any:
        if isinstance(argument, Node):
            return env[argument]
        if isinstance(argument, torch.device):
            return self._device
        return argument

    def _release(self, node: Node, env: dict[Node, Any]) -> None:
        for used in self._last_use.get(node, ()):
            env.pop(used, None)


def _depend_on_rows(nodes: list[Node]) -> dict[Node, None]:
    """Nodes that need the chosen rows, in order; a weight only they read belongs to them."""
    dependent: dict[Node, None] = {}
    for node in nodes:
        if (
            node.name == ROWS_INPUT
            or node.op == "output"
            or any(n in dependent for n in node.all_input_nodes)
        ):
            dependent[node] = None
    return dependent


def _last_uses(nodes: list[Node], per_chunk: dict[Node, None]) -> dict[Node, list[Node]]:
    """For each node, the values whose last user it is; what a chunk reads stays for all chunks."""
    position = {node: index for index, node in enumerate(nodes)}
    uses: dict[Node, list[Node]] = {}
    for node in nodes:
        if any(user in per_chunk for user in node.users):
            continue
        if node.users:
            uses.setdefault(max(node.users, key=position.__getitem__), []).append(node)
        elif node.op != "output":
            uses.setdefault(node, []).append(node)
    return uses
