"""Rotary embedding of q and k and the append of k and v to the paged cache → one op.

Three launches become one, and rotated keys go into the cache without being
written elsewhere first. Runs after the cache has been inserted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    aten,
    call_arguments,
    calls,
    dtype_of,
    insert_call,
    rank_of,
    same_size,
    shape_of,
)

_ops = torch.ops.qcompiler
_FUSED = {
    _ops.kv_append.default: _ops.rotary_kv_append.default,
    _ops.kv_append_quantized.default: _ops.rotary_kv_append_quantized.default,
}


class FuseRotaryAppend(Pass):
    """`rotary` (q), `rotary` (k) and `kv_append` → `rotary_kv_append`, for quantized caches likewise."""

    name = "fuse_rotary_append"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        tables: dict[tuple[Node, tuple[int, ...]], Node] = {}
        for node in list(gm.graph.nodes):
            if not calls(node, *_FUSED):
                continue
            _, heads, channels = shape_of(node.args[0])
            nbytes = heads * channels * dtype_of(node.args[0]).itemsize
            reason = _rewrite(gm, node, tables)
            if reason is not None:
                result.skip(node, reason)
                continue
            result.matched += 1
            result.launches_saved += 2
            result.bytes_saved += 2 * nbytes


class _Rotated(NamedTuple):
    """A tensor [tokens, heads, channels] made by a `rotary` node; where these axes lie in what that reads."""

    rotary: Node
    axes: tuple[int, ...]


def _rewrite(gm: GraphModule, append: Node, tables: dict[tuple[Node, tuple[int, ...]], Node]) -> str | None:
    call = call_arguments(append)
    attention = _reader_of(call["k_pages"], append)
    if attention is None:
        return "its pages are not read by one attention op"
    queries = call_arguments(attention)["q"]
    q, k = _rotated(queries), _rotated(call["k"])
    if q is None or k is None:
        return f"its {'keys' if q is not None else 'queries'} are not rotated, or not last"
    if q.rotary is k.rotary or q.rotary.args[1:] != k.rotary.args[1:]:
        return "queries and keys are rotated by different tables"
    _, cos, sin, interleaved = q.rotary.args
    spots = [_table_axes(table, rotated) for table in (cos, sin) for rotated in (q, k)]
    if any(spot is None for spot in spots) or len(set(spots[:2])) > 1 or len(set(spots[2:])) > 1:
        return "cos and sin are not one row for each token"
    with gm.graph.inserting_before(attention):
        rotating = [_tokens_first(gm, rotated) for rotated in (q, k)]
    turns = [_flat_table(gm, table, spot, tables) for table, spot in ((cos, spots[0]), (sin, spots[2]))]
    rest = [value for name, value in call.items() if name not in ("k", "format")]
    named = (call["format"],) if "format" in call else ()
    with gm.graph.inserting_before(attention):
        args = (*rotating, rest[0], *turns, *rest[1:], interleaved, *named)
        fused = insert_call(gm.graph, _FUSED[append.target], args, like=append)
    attention.replace_input_with(queries, fused)
    gm.graph.erase_node(append)
    return None


def _reader_of(pages: Node, append: Node) -> Node | None:
    """The one node that reads the pages besides the append."""
    readers = [user for user in pages.users if user is not append]
    attention = (_ops.paged_attention.default, _ops.paged_attention_quantized.default)
    return readers[0] if len(readers) == 1 and calls(readers[0], *attention) else None


def _rotated(node: Node) -> _Rotated | None:
    """What is rotated into `node`, seen through views that nobody else reads."""
    axes: tuple[int, ...] = (0, 1, 2)
    while len(node.users) == 1:
        if calls(node, _ops.rotary.default):
            return _Rotated(node, axes) if _is_one_sequence(node.args[0], axes) else None
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return None
        rank = rank_of(source)
        if calls(node, aten.transpose.int):
            swap = [dim % rank for dim in node.args[1:3]]
            axes = tuple(swap[1 - swap.index(axis)] if axis in swap else axis for axis in axes)
        elif calls(node, aten.squeeze.dim) and same_size(shape_of(source)[node.args[1]], 1):
            axes = tuple(axis + (axis >= node.args[1] % rank) for axis in axes)
        else:
            return None
        node = source
    return None


def _is_one_sequence(x: Node, axes: tuple[int, ...]) -> bool:
    """X is [1, ·, ·, channels]."""
    return rank_of(x) == 4 and 0 not in axes and axes[2] == 3 and same_size(shape_of(x)[0], 1)


def _tokens_first(gm: GraphModule, rotated: _Rotated) -> Node:
    flat = insert_call(gm.graph, aten.squeeze.dim, (rotated.rotary.args[0], 0), like=rotated.rotary)
    if rotated.axes[0] == 1:
        return flat
    return insert_call(gm.graph, aten.transpose.int, (flat, 0, 1), like=rotated.rotary)


def _table_axes(table: Node, rotated: _Rotated) -> tuple[int, ...] | None:
    """Axes of size 1 without which a table is [tokens, rotated channels]; None if it is another."""
    x = shape_of(rotated.rotary.args[0])
    shape = list(shape_of(table))
    if len(shape) == 3:
        shape.insert(1, 1)  # as `rotary` reads it
    tokens = rotated.axes[0]
    wide = [1] * (4 - len(shape)) + shape
    others = [axis for axis in range(3) if axis != tokens]
    if not same_size(wide[tokens], x[tokens]) or not all(same_size(wide[axis], 1) for axis in others):
        return None
    rank = rank_of(table)
    if rank == 3:
        return (0,) if tokens == 2 else None
    return tuple(axis - (4 - rank) for axis in others if axis >= 4 - rank)


def _flat_table(
    gm: GraphModule,
    table: Node,
    axes: tuple[int, ...] | None,
    made: dict[tuple[Node, tuple[int, ...]], Node],
) -> Node:
    """The table as [tokens, rotated channels], made once for all layers."""
    key = (table, axes or ())
    if key not in made:
        flat = table
        for axis in sorted(axes or (), reverse=True):
            with gm.graph.inserting_after(flat):
                flat = insert_call(gm.graph, aten.squeeze.dim, (flat, axis), like=table)
        made[key] = flat
    return made[key]
