"""Dense attention → attention over a paged KV cache or over ragged sequences, caches being graph inputs.

The token axis holds all tokens of a step, sequences end to end; only attention
looks across tokens, so replacing it makes the whole graph serve prefill,
decode, mixed batches and chunked prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.kernels.formats.kv_cache import kv_format as find_format
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
    seq_lens int32 [S], max_query_len, and k_pages_<i>, v_pages_<i> per layer; with a format also
    k_scales_<i> and v_scales_<i>, and the ops are `kv_append_quantized` and `paged_attention_quantized`.

    Args:
        page_size: Tokens per page, if the graph is to be bound to one; symbolic otherwise.
        kv_dtype: Element type of the pages; that of k if None. Not with a format.
        kv_format: Format of a quantized cache ("int8", "int4", "fp8"; `kernels/formats/kv_cache.py`), which
            changes numerics; None keeps keys and values as they are.
    """

    name = "insert_paged_kv_cache"
    required = True

    def __init__(
        self,
        page_size: int | None = None,
        kv_dtype: torch.dtype | None = None,
        kv_format: str | None = None,
    ):
        self.page_size = page_size
        self.kv_dtype = kv_dtype
        self.kv_format = None if kv_format is None else find_format(kv_format)

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
            k_stored, v_stored = self._stored(node.args[1]), self._stored(node.args[2])
            caches = [
                builder.tensor(f"{name}_{kind}_{index}", (num_pages, page_size, *row), dtype)
                for kind in k_stored
                for name, (row, dtype) in (("k", k_stored[kind]), ("v", v_stored[kind]))
            ]
            with gm.graph.inserting_before(node):
                q, k, v = (_tokens_first(gm, item) for item in node.args[:3])
                metadata = (block_table, query_start, seq_lens, max_query_len)
                told: tuple[Any, ...] = metadata
                named: tuple[str, ...] = ()
                append, attend = _ops.kv_append.default, _ops.paged_attention.default
                if self.kv_format is not None:
                    append = _ops.kv_append_quantized.default
                    attend = _ops.paged_attention_quantized.default
                    named = (self.kv_format.name,)
                    told = (*metadata, shape_of(v)[2], *named)
                insert_call(gm.graph, append, (k, v, *caches, slots, *named), like=node)
                out = insert_call(gm.graph, attend, (q, *caches, *told, *node.args[3:]), like=node)
                out = insert_call(gm.graph, aten.unsqueeze.default, (out, 0), like=node)
            replace(node, out)
            result.matched += 1

    def _stored(self, tensor: Node) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """What is kept of one token's keys or values: kind of input → its shape and dtype."""
        heads, width = shape_of(tensor)[1], shape_of(tensor)[3]
        if self.kv_format is None:
            return {"pages": ((heads, width), self.kv_dtype or dtype_of(tensor))}
        return {
            "pages": ((heads, self.kv_format.words(width)), torch.int16),
            "scales": (self.kv_format.scale_row(heads), self.kv_format.scale_dtype),
        }


class InsertRagged(Pass):
    """Each `attention` → `ragged_attention` over sequences laid end to end; for models without a cache.

    Adds the inputs query_start int32 [S + 1] and max_query_len.

    Args:
        kv_format: Attend over what a cache of this format would give back of keys and values, as the
            measurement of quality does; it changes numerics.
    """

    name = "insert_ragged"
    required = True

    def __init__(self, kv_format: str | None = None):
        self.kv_format = None if kv_format is None else find_format(kv_format)

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
                if self.kv_format is not None:
                    k, v = (
                        insert_call(gm.graph, _ops.kv_round.default, (item, self.kv_format.name), like=node)
                        for item in (k, v)
                    )
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
