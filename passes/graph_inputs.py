"""New inputs of a graph: placeholders with symbolic sizes, in the order of the lowered graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qcompiler.kernels.errors import PassError
from qcompiler.passes.graph_utils import Node, fake_mode, graph_device, plain_signature

Size = int | torch.SymInt

# Inputs that passes add to a decoder, in the order in which the runtime gives them.
PAGE_INPUTS = ("k_pages_", "v_pages_", "k_scales_", "v_scales_")
DECODER_INPUTS = ("logits_rows", "slots", "block_table", "query_start", "seq_lens", "max_query_len")


class InputBuilder:
    """Adds placeholders to `gm` behind those it has.

    Args:
        gm: A graph exported with a symbolic token axis.

    Raises:
        PassError: The graph's values know no symbolic sizes.
    """

    def __init__(self, gm: GraphModule):
        self.gm = gm
        mode = fake_mode(gm.graph)
        if mode is None or mode.shape_env is None:
            raise PassError(
                "the graph's shapes are all fixed, so its inputs cannot vary in length",
                hint="Export with a dynamic token axis (dynamic_shapes=…).",
            )
        self.mode: FakeTensorMode = mode
        self.device = graph_device(gm.graph)
        plain_signature(gm)

    def size(self, name: str, example: int) -> Size:
        """A fresh symbolic size; `example` only has to differ from sizes that mean something else."""
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        empty = torch.empty(example, device="meta")
        fake = self.mode.from_tensor(empty, source=ConstantSource(f"__{name}"), symbolic_context=context)
        return fake.shape[0]

    def tensor(self, name: str, shape: Sequence[Size], dtype: torch.dtype) -> Node:
        """A tensor input."""
        with self.mode:
            return self._placeholder(name, torch.empty(tuple(shape), dtype=dtype, device=self.device))

    def integer(self, name: str, example: int) -> Node:
        """An integer input."""
        return self._placeholder(name, self.size(name, example))

    def _placeholder(self, name: str, value: Any) -> Node:
        existing = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        if any(node.target == name for node in existing):
            raise PassError(f"the graph already has an input named {name}")
        earlier = [node for node in existing if _rank(str(node.target)) <= _rank(name)]
        anchor = earlier[-1] if earlier else None
        graph = self.gm.graph
        place = (
            graph.inserting_after(anchor)
            if anchor is not None
            else graph.inserting_before(next(iter(graph.nodes)))
        )
        with place:
            node = graph.placeholder(name)
        node.meta["val"] = value
        return node


def _rank(name: str) -> int:
    """Where an input belongs: the model's own first, then ours in their order, then the pages."""
    if name in DECODER_INPUTS:
        return 1 + DECODER_INPUTS.index(name)
    return 1 + len(DECODER_INPUTS) if name.startswith(PAGE_INPUTS) else 0
