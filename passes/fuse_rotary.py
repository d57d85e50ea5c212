"""Rotary position embedding of q and k → `qcompiler::rotary`, whichever way the model wrote it.

Partial rotation (the remaining channels concatenated behind) becomes one op
over all channels. Tables are shared: what layers derive from the same cos and
sin is computed once.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    dtype_of,
    insert_call,
    last_dim,
    last_dim_span,
    rank_of,
    replace,
    same_size,
    shape_of,
)
from qcompiler.passes.norm_patterns import only_cast, without_widening
from qcompiler.passes.rotary_patterns import Rotation, match_rotation


class FuseRotary(Pass):
    """Rotations by cos and sin tables → `qcompiler::rotary`, exact in every dtype."""

    name = "fuse_rotary"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        tables = _Tables(gm)
        for node in list(gm.graph.nodes):
            rotation = match_rotation(node)
            if rotation is None:
                continue
            reason = _rewrite(gm, rotation, tables)
            if reason is None:
                result.matched += 1
            else:
                result.skip(node, reason)


def _rewrite(gm: GraphModule, rotation: Rotation, tables: _Tables) -> str | None:
    graph, end = gm.graph, rotation.end
    sample = rotation.parts[0] if rotation.parts else rotation.x
    if rank_of(sample) != 4:
        return f"the rotated tensor has {rank_of(sample)} dimensions, not batch, heads, tokens, channels"
    if rank_of(rotation.cos) != rank_of(rotation.sin):
        return "cos and sin have different ranks"
    columns = (last_dim(sample) or 0) // (1 if rotation.x is None or not rotation.half_tables else 2)
    if last_dim(rotation.cos) != columns or last_dim(rotation.sin) != columns:
        return f"cos has {last_dim(rotation.cos)} columns for {columns} channels"
    axis = _head_axis(rotation.cos), _head_axis(rotation.sin)
    if axis[0] is None or axis[0] != axis[1]:
        return "cos and sin do not broadcast over one axis of heads"

    x = rotation.x
    if rotation.parts:
        with graph.inserting_before(end):
            x = insert_call(graph, aten.cat.default, (list(rotation.parts), -1), like=end)
    computed, narrow, cast = dtype_of(end), without_widening(x), only_cast(end)
    if computed != dtype_of(narrow) and cast is not None and dtype_of(cast) == dtype_of(narrow):
        x, end = narrow, cast
    elif computed == dtype_of(narrow):
        x = narrow
    elif computed != dtype_of(x):
        return f"input is {dtype_of(narrow)} but the result stays in {computed}"

    x, end = _whole_head(x, end)
    cos = tables.get(rotation.cos, rotation, computed, dtype_of(x))
    sin = tables.get(rotation.sin, rotation, computed, dtype_of(x))
    with graph.inserting_before(end):
        if axis[0] == 2:
            x = insert_call(graph, aten.transpose.int, (x, 1, 2), like=end)
        fused = insert_call(
            graph, torch.ops.qcompiler.rotary.default, (x, cos, sin, rotation.interleaved), like=rotation.end
        )
        if axis[0] == 2:
            fused = insert_call(graph, aten.transpose.int, (fused, 1, 2), like=end)
    replace(end, fused)
    return None


def _head_axis(table: Node) -> int | None:
    """The axis of x [B, ·, ·, D] that a table leaves to the heads: 1 or 2; None if it does neither."""
    shape = shape_of(table)
    if len(shape) == 2:
        return 1
    if len(shape) != 4:
        return None
    return next((axis for axis in (1, 2) if same_size(shape[axis], 1)), None)


def _whole_head(x: Node, end: Node) -> tuple[Node, Node]:
    """Widen a rotation of the first channels to the whole head, if the rest is concatenated behind it."""
    span = last_dim_span(x)
    user = next(iter(end.users), None)
    if span is None or span.start != 0 or span.step != 1 or len(end.users) != 1 or user is None:
        return x, end
    if not calls(user, aten.cat.default) or argument(user, 1, "dim", 0) % rank_of(user) != rank_of(user) - 1:
        return x, end
    parts = user.args[0]
    rest = last_dim_span(parts[1]) if len(parts) == 2 and parts[0] is end else None
    if rest is None or rest[1:] != (span.end, span.size, 1, span.size) or rest.source is not span.source:
        return x, end
    return span.source, user


class _Tables:
    """cos and sin as the op wants them, each derived once and placed behind its source."""

    def __init__(self, gm: GraphModule):
        self.graph = gm.graph
        self.made: dict[tuple[object, ...], Node] = {}

    def get(self, table: Node, rotation: Rotation, computed: torch.dtype, x_dtype: torch.dtype) -> Node:
        """The table with a column per channel, [B, T, R] or [B, 1, T, R], in a dtype that computes alike."""
        if _head_axis(table) == 2:
            table = self._derive(table, aten.transpose.int, 1, 2)
        elif rank_of(table) == 2:
            table = self._derive(table, aten.unsqueeze.default, 0)
        if calls(table, aten.unsqueeze.default) and rank_of(table) == 4 and table.args[1] % 4 == 1:
            table = table.args[0]
        if rotation.half_tables:
            if rotation.interleaved:
                table = self._derive(table, aten.repeat_interleave.self_int, 2, -1)
            else:
                table = self._join(table)
        if torch.promote_types(x_dtype, dtype_of(table)) != computed:
            table = self._derive(table, aten.to.dtype, computed)
        return table

    def _derive(self, source: Node, op: torch._ops.OpOverload, *args: object) -> Node:
        key = (source, op, args)
        if key not in self.made:
            with self.graph.inserting_after(source):
                self.made[key] = insert_call(self.graph, op, (source, *args), like=source)
        return self.made[key]

    def _join(self, source: Node) -> Node:
        key = (source, aten.cat.default)
        if key not in self.made:
            with self.graph.inserting_after(source):
                self.made[key] = insert_call(
                    self.graph, aten.cat.default, ([source, source], -1), like=source
                )
        return self.made[key]
