"""What RMSNorm and LayerNorm share in graphs: 1/√(mean(·²) + ε), a product, a weight, casts around."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    dtype_of,
    is_tensor,
    last_dim,
    other,
    rank_of,
    shape_of,
)


class InverseRoot(NamedTuple):
    """`1 / sqrt(variance + eps)` as it stands at `node`; `scaled` is its product with a tensor."""

    node: Node
    variance: Node
    eps: float
    scaled: Node | None
    factor: Node | None


class Tail(NamedTuple):
    """What follows the normalised tensor: where the norm ends and with which weight.

    `cast_first`: the normalised tensor is rounded before the weight is applied.
    """

    end: Node
    weight: Node | None
    offset: float
    bias: Node | None
    cast_first: bool


def find_inverse_roots(nodes: list[Node]) -> list[InverseRoot]:
    """All `rsqrt(v + eps)`, `pow(v + eps, -0.5)` and `1 / sqrt(v + eps)`, each with the product it scales."""
    found = []
    for node in nodes:
        root = _radicand(node)
        if root is None:
            continue
        radicand, divides = root
        variance, eps = radicand, 0.0
        if calls(radicand, aten.add.Tensor, aten.add.Scalar):
            a, b = radicand.args
            if isinstance(a, (int, float)):
                a, b = b, a
            if not isinstance(b, (int, float)) or argument(radicand, 2, "alpha", 1) != 1:
                continue
            variance, eps = a, float(b)
        scaled = factor = None
        if len(node.users) == 1:
            user = next(iter(node.users))
            if not divides and calls(user, aten.mul.Tensor) and is_tensor(other(user.args, node)):
                scaled, factor = user, other(user.args, node)
            elif (
                divides and calls(user, aten.div.Tensor) and user.args[1] is node and is_tensor(user.args[0])
            ):
                scaled, factor = user, user.args[0]
        found.append(InverseRoot(node, variance, eps, scaled, factor))
    return found


def _radicand(node: Node) -> tuple[Node, bool] | None:
    """What stands under the root, and whether `node` is the root itself, to divide by."""
    if calls(node, aten.rsqrt.default):
        return node.args[0], False
    if calls(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        return node.args[0], False
    if calls(node, aten.sqrt.default):
        return node.args[0], True
    if calls(node, aten.reciprocal.default) and calls(node.args[0], aten.sqrt.default):
        return node.args[0].args[0], False
    return None


def mean_of(node: Node) -> tuple[Node, str | None] | None:
    """`(x, None)` for `mean(x, -1, keepdim)`, `(x, reason)` for another mean, None for anything else."""
    if not calls(node, aten.mean.dim, aten.mean.default):
        return None
    source = node.args[0]
    if node.target is aten.mean.default:
        return source, "the mean is taken over all dimensions"
    dims = [d % rank_of(source) for d in node.args[1] or range(rank_of(source))]
    if dims != [rank_of(source) - 1]:
        return source, f"the mean is taken over dimensions {dims}, not the last"
    if not argument(node, 2, "keepdim", False):
        return source, "the mean does not keep its dimension"
    return source, None


def squared(node: Node) -> Node | None:
    """x, if `node` is x²."""
    if calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        return node.args[0]
    if calls(node, aten.square.default):
        return node.args[0]
    if calls(node, aten.mul.Tensor) and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def is_cast(node: Node) -> bool:
    """True for a conversion from one float dtype to another on the same device."""
    return (
        calls(node, aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.to.dtype_layout)
        and is_tensor(node.args[0])
        and dtype_of(node).is_floating_point
        and dtype_of(node.args[0]).is_floating_point
    )


def without_widening(node: Node) -> Node:
    """Follow casts to a wider float back: the value is the same number."""
    while is_cast(node) and _widens(dtype_of(node.args[0]), dtype_of(node)):
        node = node.args[0]
    return node


def _widens(old: torch.dtype, new: torch.dtype) -> bool:
    return old == new or old.itemsize < new.itemsize


def read_tail(normed: Node, allow_bias: bool) -> Tail:
    """Follow the normalised tensor through casts, weight and bias as far as they can be told.

    Args:
        normed: x · 1/√(…), in the dtype of the statistics.
        allow_bias: Also take an added vector.
    """
    end = only_cast(normed) or normed
    cast_first = end is not normed
    product = _vector_user(end, aten.mul.Tensor)
    if product is None or (cast_first and dtype_of(product) != dtype_of(end)):
        return Tail(end, None, 0.0, None, cast_first)
    weight, offset = _split_offset(other(product.args, end), dtype_of(end))
    end, bias = product, None
    if allow_bias:
        total = _vector_user(end, aten.add.Tensor)
        if total is not None and argument(total, 2, "alpha", 1) == 1:
            bias, end = without_widening(other(total.args, end)), total
    if not cast_first:
        end = only_cast(end) or end
    return Tail(end, weight, offset, bias, cast_first)


def only_cast(node: Node) -> Node | None:
    """The narrowing cast that alone reads `node`."""
    user = next(iter(node.users), None)
    if (
        len(node.users) == 1
        and user is not None
        and is_cast(user)
        and not _widens(dtype_of(node), dtype_of(user))
    ):
        return user
    return None


def _vector_user(node: Node, op: torch._ops.OpOverload) -> Node | None:
    """The reader of `node`, if it is alone and combines it by `op` with a vector along the last dimension."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or not calls(user, op):
        return None
    vector = other(user.args, node)
    if not is_tensor(vector) or rank_of(vector) != 1 or last_dim(vector) != last_dim(node):
        return None
    return user


def _split_offset(weight: Node, dtype: torch.dtype) -> tuple[Node, float]:
    """`(w, offset)` for a factor `offset + w` added in `dtype`, `(weight, 0)` for any other factor."""
    if calls(weight, aten.add.Tensor, aten.add.Scalar) and dtype_of(weight) == dtype:
        a, b = weight.args
        if isinstance(a, (int, float)):
            a, b = b, a
        if isinstance(b, (int, float)) and argument(weight, 2, "alpha", 1) == 1 and is_tensor(a):
            return without_widening(a), float(b)
    return without_widening(weight), 0.0


def norm_input(x: Node, result: torch.dtype) -> Node | None:
    """The node to hand to a norm whose result has dtype `result`: its input must have that dtype too."""
    narrow = without_widening(x)
    if dtype_of(narrow) == result:
        return narrow
    return x if dtype_of(x) == result else None


def normalises_last_dim(node: Node, shape: list[int]) -> bool:
    """True if `shape`, a layer_norm's normalized_shape, is exactly the last dimension."""
    return len(shape) == 1 and shape[0] == shape_of(node)[-1]
