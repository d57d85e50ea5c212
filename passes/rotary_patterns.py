"""The ways models write a rotation by position: what is rotated, by which tables, in which layout.

Whole:  x · cos + rotate(x) · sin, rotate being built by cat (halves) or stack and flatten (interleaved);
parts:  x1 · cos − x2 · sin and x2 · cos + x1 · sin, put together by cat or stack and flatten.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    is_tensor,
    last_dim,
    last_dim_span,
    other,
    rank_of,
    same_shape,
    shape_of,
)
from qcompiler.passes.norm_patterns import without_widening


class Rotation(NamedTuple):
    """A matched rotation.

    Attributes:
        end: Node that holds the rotated tensor.
        x: What is rotated, if it stands as one tensor; else None and `parts` are its two halves.
        parts: First and second half.
        cos: Table with one column per channel, or per pair of channels if `half_tables`.
        sin: The other table.
        interleaved: Pairs are neighbours (2i, 2i + 1) instead of (i, i + R/2).
        half_tables: The tables have a column per pair.
    """

    end: Node
    x: Node | None
    parts: tuple[Node, Node] | None
    cos: Node
    sin: Node
    interleaved: bool
    half_tables: bool


def match_rotation(node: Node) -> Rotation | None:
    """The rotation that ends at `node`, if any."""
    return _match_whole(node) or _match_parts(node)


def _match_whole(node: Node) -> Rotation | None:
    if not calls(node, aten.add.Tensor) or argument(node, 2, "alpha", 1) != 1:
        return None
    for straight, crossed in (node.args[:2], node.args[1::-1]):
        if not calls(straight, aten.mul.Tensor) or not calls(crossed, aten.mul.Tensor):
            continue
        for turned in crossed.args:
            turn = _turned(without_widening(turned)) if is_tensor(turned) else None
            if turn is None or not all(map(is_tensor, (*straight.args, *crossed.args))):
                continue
            for x in straight.args:
                if without_widening(x) is without_widening(turn[0]):
                    cos, sin = other(straight.args, x), other(crossed.args, turned)
                    return Rotation(node, x, None, cos, sin, turn[1], False)
    return None


def _turned(node: Any) -> tuple[Node, bool] | None:
    """`(x, interleaved)` if `node` is x with each pair (a, b) replaced by (−b, a)."""
    if calls(node, aten.cat.default) and _joins_last(node, 0):
        negative, first = _two(node)
        if calls(negative, aten.neg.default):
            a, b = last_dim_span(first), last_dim_span(negative.args[0])
            if a and b and a.source is b.source and 2 * a.end == a.size and a[1:] == (0, b.start, 1, b.size):
                return (a.source, False) if b.end == b.size and b.step == 1 else None
    stack = _flattened_stack(node)
    if stack is not None:
        negative, first = _two(stack)
        if calls(negative, aten.neg.default):
            a, b = last_dim_span(first), last_dim_span(negative.args[0])
            if a and b and a.source is b.source and _is_pairs(a, b):
                return a.source, True
    return None


def _match_parts(node: Node) -> Rotation | None:
    if calls(node, aten.cat.default) and _joins_last(node, 0):
        joined, interleaved = node, False
    else:
        stack = _flattened_stack(node)
        if stack is None:
            return None
        joined, interleaved = stack, True
    first, second = _two(joined)
    if not calls(first, aten.sub.Tensor) or not calls(second, aten.add.Tensor):
        return None
    if argument(first, 2, "alpha", 1) != 1 or argument(second, 2, "alpha", 1) != 1:
        return None
    products = (*first.args[:2], *second.args[:2])
    if not all(calls(item, aten.mul.Tensor) and all(map(is_tensor, item.args)) for item in products):
        return None
    a, b = first.args[:2]
    for (c, d), cos, sin in product((second.args[:2], second.args[1::-1]), a.args, b.args):
        # first = x1·cos − x2·sin, second = x2·cos + x1·sin
        x1, x2 = other(a.args, cos), other(b.args, sin)
        if not (cos in c.args and sin in d.args and other(c.args, cos) is x2 and other(d.args, sin) is x1):
            continue
        if same_shape(shape_of(x1), shape_of(x2)):
            return _from_parts(node, x1, x2, cos, sin, interleaved)
    return None


def _from_parts(node: Node, x1: Node, x2: Node, cos: Node, sin: Node, interleaved: bool) -> Rotation | None:
    if last_dim(cos) != last_dim(x1) or last_dim(sin) != last_dim(x1):
        return None
    a, b = last_dim_span(x1), last_dim_span(x2)
    if a and b and a.source is b.source:
        halves = a[1:] == (0, a.size // 2, 1, a.size) and b[1:] == (a.size // 2, a.size, 1, a.size)
        if _is_pairs(a, b) if interleaved else halves:
            return Rotation(node, a.source, None, cos, sin, interleaved, True)
    if interleaved:
        return None
    return Rotation(node, None, (x1, x2), cos, sin, False, True)


def _is_pairs(a: tuple, b: tuple) -> bool:
    """True if two spans are the even and the odd channels of one tensor."""
    _, start_a, end_a, step_a, size = a
    _, start_b, end_b, step_b, _ = b
    return (
        (start_a, step_a, start_b, step_b) == (0, 2, 1, 2)
        and size % 2 == 0
        and end_a >= size - 1
        and end_b >= size
    )


def _two(node: Node) -> tuple[Node, Node]:
    first, second = node.args[0]
    return first, second


def _joins_last(node: Node, extra: int) -> bool:
    """True if a cat (extra 0) or stack (extra 1) of exactly two tensors runs along the last dimension."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(map(is_tensor, parts)):
        return False
    rank = rank_of(parts[0]) + extra
    return argument(node, 1, "dim", 0) % rank == rank - 1


def _flattened_stack(node: Any) -> Node | None:
    """The stack of two tensors along a new last dimension that `node` flattens away."""
    if not calls(node, aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        return None
    stack = node.args[0]
    if not calls(stack, aten.stack.default) or not _joins_last(stack, 1):
        return None
    part = stack.args[0][0]
    flat = (*shape_of(part)[:-1], 2 * shape_of(part)[-1])
    return stack if same_shape(shape_of(node), flat) else None
