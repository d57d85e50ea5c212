"""Dense attention → attention over a paged KV cache or over ragged sequences, caches being graph inputs.

The token axis holds all tokens of a step, sequences end to end; only attention
looks across tokens, so replacing it makes the whole graph serve prefill,
decode, mixed batches and chunked prefill.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_inputs import InputBuilder
from qcompiler.passes.graph_utils import (
    Node,
    aten,
    calls,
    dtype_of,
    insert_call,
    rank_of,
    replace,
    same_size,
    shape_of,
)

_ops = torch.ops.qcompiler


class InsertPagedKVCache(Pass):
    """Each `attention` → `kv_append` and `paged_attention`; all of them or none.

    Adds the inputs slots int64 [T], block_table int32 [S, P], query_start int32 [S + 1],
    seq_lens int32 [S], max_query_len, and k_pages_<i>, v_pages_<i> per layer.

    Args:
        page_size: Tokens per page, if the graph is to be bound to one; symbolic otherwise.
        kv_dtype: Element type of the pages; that of k if None.
    """

    name = "insert_paged_kv_cache"
    required = True

    def __init__(self, page_size: int | None = None, kv_dtype: torch.dtype | None = None):
        self.page_size = page_size
        self.kv_dtype = kv_dtype

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        layers = _attention_layers(gm, result, lambda node: None if node.args[4] else _BIDIRECTIONAL)
        if not layers:
            return
        builder = InputBuilder(gm)
        tokens = shape_of(layers[0].args[0])[2]
        sequences = builder.size("sequences", 5)
        slots = builder.tensor("slots", (tokens,), torch.int64)
        block_table = builder.tensor(
            "block_table", (sequences, builder.size("pages_per_sequence", 6)), torch.int32
        )
        query_start = builder.tensor("query_start", (sequences + 1,), torch.int32)
        seq_lens = builder.tensor("seq_lens", (sequences,), torch.int32)
        max_query_len = builder.integer("max_query_len", 7)
        num_pages = builder.size("num_pages", 13)
        page_size = self.page_size or builder.size("page_size", 16)
        for index, node in enumerate(layers):
            pages = []
            for name, tensor in (("k", node.args[1]), ("v", node.args[2])):
                heads, width = shape_of(tensor)[1], shape_of(tensor)[3]
                dtype = self.kv_dtype or dtype_of(tensor)
                pages.append(
                    builder.tensor(f"{name}_pages_{index}", (num_pages, page_size, heads, width), dtype)
                )
            with gm.graph.inserting_before(node):
                q, k, v = (_tokens_first(gm, item) for item in node.args[:3])
                insert_call(gm.graph, _ops.kv_append.default, (k, v, *pages, slots), like=node)
                metadata = (block_table, query_start, seq_lens, max_query_len)
                out = insert_call(
                    gm.graph, _ops.paged_attention.default, (q, *pages, *metadata, *node.args[3:]), like=node
                )
                out = insert_call(gm.graph, aten.unsqueeze.default, (out, 0), like=node)
            replace(node, out)
            result.matched += 1


class InsertRagged(Pass):
    """Each `attention` → `ragged_attention` over sequences laid end to end; for models without a cache.

    Adds the inputs query_start int32 [S + 1] and max_query_len.
    """

    name = "insert_ragged"
    required = True

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        layers = _attention_layers(gm, result, lambda node: None)
        if not layers:
            return
        builder = InputBuilder(gm)
        query_start = builder.tensor("query_start", (builder.size("sequences", 5) + 1,), torch.int32)
        max_query_len = builder.integer("max_query_len", 7)
        for node in layers:
            with gm.graph.inserting_before(node):
                q, k, v = (_tokens_first(gm, item) for item in node.args[:3])
                out = insert_call(
                    gm.graph,
                    _ops.ragged_attention.default,
                    (q, k, v, query_start, max_query_len, *node.args[3:]),
                    like=node,
                )
                out = insert_call(gm.graph, aten.unsqueeze.default, (out, 0), like=node)
            replace(node, out)
            result.matched += 1


_BIDIRECTIONAL = "it is not causal: its queries see later tokens, which a cache does not hold yet"


def _attention_layers(
    gm: GraphModule, result: PassResult, refuse: Callable[[Node], str | None]
) -> list[Node]:
    """All attention nodes in order, or none if one does not fit: a graph is ragged as a whole or not."""
    layers, fits = [], True
    for node in gm.graph.nodes:
        if not calls(node, _ops.attention.default):
            continue
        reason = _unfit(node) or refuse(node)
        if reason is not None:
            result.skip(node, reason)
            fits = False
        layers.append(node)
    return layers if fits else []


def _unfit(node: Node) -> str | None:
    q, k, v = node.args[:3]
    if not all(rank_of(item) == 4 and same_size(shape_of(item)[0], 1) for item in (q, k, v)):
        return "its batch is not 1: ragged graphs lay sequences end to end in a batch of one"
    if not same_size(shape_of(q)[2], shape_of(k)[2]):
        return "queries and keys come from different tokens (cross-attention)"
    return None


def _tokens_first(gm: GraphModule, node: Node) -> Node:
    """[1, H, T, D] → [T, H, D], as a view."""
    flat = insert_call(gm.graph, aten.squeeze.dim, (node, 0), like=node)
    return insert_call(gm.graph, aten.transpose.int, (flat, 0, 1), like=node)
