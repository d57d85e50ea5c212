"""`aten.embedding` → the gathering op of a storage format; a tied output head shares the stored tensors.

Run before `QuantizeLinears`, which would give a tied head tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace as changed
from typing import Any

from torch.fx import GraphModule

from qcompiler.kernels.formats.base import EmbeddingFormat, get_format
from qcompiler.passes.addmm_to_linear import linear_bias
from qcompiler.passes.base import Pass
from qcompiler.passes.graph_utils import (
    Node,
    aten,
    calls,
    dtype_of,
    insert_call,
    is_parameter,
    is_tensor,
    replace,
    shape_of,
)
from qcompiler.passes.quantized_weights import (
    NAME,
    Choose,
    QuantizedLinear,
    QuantizeResult,
    QuantizeWeight,
    insert_stored,
    reader_name,
    readers_of,
    register_quantized,
)


class QuantizeEmbeddings(Pass):
    """Stores embedding tables quantized; `matched` counts look-ups and tied linears.

    Args:
        choose: (layer name, num_embeddings, embedding_dim) → the spec to quantize with, or a string saying
            why the table stays as it is.
        quantize: (layer name, table, spec) → stored tensors by part; see `QuantizeLinears`.
        share: Name of a linear tied to a quantized table → None to let it read the same stored tensors, or
            why it keeps the float table instead. By default all share.
        inputs: Names of the placeholders whose look-ups count; None: every table. Tables of positions and
            segments are small, and part of every token.
    """

    name = "quantize_embeddings"
    required = True
    changes_numerics = True

    def __init__(
        self,
        choose: Choose,
        quantize: QuantizeWeight | None = None,
        share: Callable[[str], str | None] | None = None,
        inputs: Collection[str] | None = ("input_ids",),
    ):
        self.choose = choose
        self.quantize = quantize
        self.share = share or (lambda _: None)
        self.inputs = inputs

    def new_result(self) -> QuantizeResult:
        """A result that also lists what was quantized."""
        return QuantizeResult(self.name)

    def apply(self, gm: GraphModule, result: Any) -> None:
        """See the class."""
        seen: set[str] = set()
        for node in list(gm.graph.nodes):
            if not calls(node, aten.embedding.default) or not is_parameter(node.args[0]):
                continue
            fqn = str(node.args[0].target)
            if fqn not in seen:
                seen.add(fqn)
                self._quantize(gm, node, fqn, result)

    def _quantize(self, gm: GraphModule, first: Node, fqn: str, result: QuantizeResult) -> None:
        name = reader_name(first, first.args[0])
        rows, columns = map(int, shape_of(first.args[0]))
        readers = readers_of(gm, fqn)
        lookups = [node for node in readers if calls(node, aten.embedding.default)]
        linears = [node for node in readers if _reads_as_linear(node, fqn)]
        if self.inputs is not None and not any(_source(node.args[1]) in self.inputs for node in lookups):
            result.skip(name, f"not looked up by {' or '.join(self.inputs)}")
            return
        others = [node.name for node in readers if node not in lookups and node not in linears]
        if others:
            result.skip(name, f"its table is also read by {others[0]}")
            return
        spec = self.choose(name, rows, columns)
        if isinstance(spec, str):
            result.skip(name, spec)
            return
        format_ = get_format(spec.name)
        if not isinstance(format_, EmbeddingFormat):
            result.skip(name, f"format {spec.name} has no op for embeddings")
            return
        layer = QuantizedLinear(name, fqn, None, spec.name, spec, rows, columns, kind="embedding")
        register_quantized(gm, layer, self.quantize)
        shared = []
        named = [(node, "") for node in lookups] + [
            (node, reader_name(node, node.args[1])) for node in linears
        ]
        for node, linear in named:
            reason = self.share(linear) if linear else None
            if reason is not None:
                node.meta[NAME] = linear
                result.skip(linear, reason)
                continue
            with gm.graph.inserting_before(node):
                tensors = insert_stored(gm, layer)
                if linear:
                    op, args = format_.op_call(spec, node.args[0], tensors, linear_bias(node), columns)
                    shared.append(linear)
                else:
                    op, args = format_.embedding_op_call(spec, node.args[1], tensors, columns, dtype_of(node))
                replace(node, insert_call(gm.graph, op, args, like=node))
            result.matched += 1
        result.quantized.append(changed(layer, shared_with=tuple(shared)))


def _reads_as_linear(node: Node, fqn: str) -> bool:
    if not calls(node, aten.linear.default) or not is_parameter(node.args[1]):
        return False
    return str(node.args[1].target) == fqn


def _source(ids: Node) -> str | None:
    """Name of the placeholder that ids come from through ops of one tensor, or None."""
    while ids.op == "call_function" and len(ids.all_input_nodes) == 1:
        ids = ids.all_input_nodes[0]
        if not is_tensor(ids):
            return None  # its length only
    return str(ids.target) if ids.op == "placeholder" else None
