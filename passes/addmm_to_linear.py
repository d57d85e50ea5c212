"""Matrix products with a parameter → `aten.linear`, the one form that quantization and fusion look for.

`addmm(bias, x, W)` of GPT-2's Conv1D (weight [in, out]), `mm` and `matmul`
with a parameter or its transpose, and `linear` with a transposed parameter. The
views that Conv1D puts around its product go away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx
from torch.fx import GraphModule

from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    argument,
    aten,
    calls,
    dtype_of,
    get_attribute,
    insert_attribute,
    insert_call,
    is_parameter,
    is_tensor,
    rank_of,
    replace,
    same_shape,
    same_size,
    shape_of,
)
from qcompiler.passes.weights import Loaded, recipe_of, register_weight, weight_of


class AddmmToLinear(Pass):
    """`addmm`, `mm` and `matmul` by a parameter → `aten.linear` over a weight [out, in].

    A weight stored [in, out] is transposed once, under the name `<weight>_t`; the matrix product
    may then add in another order, so results agree to rounding.
    """

    name = "addmm_to_linear"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        for node in list(gm.graph.nodes):
            found = _read(node)
            if found is None:
                continue
            if isinstance(found, str):
                result.skip(node, found)
                continue
            reason = _rewrite(gm, node, found)
            if reason is None:
                result.matched += 1
            else:
                result.skip(node, reason)


class _Product(NamedTuple):
    x: Node
    parameter: Node
    stored_in_out: bool
    bias: Node | None


def _read(node: Node) -> _Product | str | None:
    """The product x @ W (+ bias) at `node`; a reason if W is a parameter but linear cannot express it."""
    if calls(node, aten.addmm.default):
        bias, x, weight = node.args[:3]
    elif calls(node, aten.mm.default, aten.matmul.default):
        (x, weight), bias = node.args[:2], None
    elif calls(node, aten.linear.default) and not is_parameter(node.args[1]):
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    else:
        return None
    held = _parameter(weight) if is_tensor(weight) else None
    if held is None:
        return None
    parameter, turned = held
    if rank_of(weight) != 2:
        return f"the weight has {rank_of(weight)} dimensions"
    if calls(node, aten.linear.default):
        return _Product(x, parameter, True, bias)
    if calls(node, aten.addmm.default):
        if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
            return "alpha or beta is not 1"
        if rank_of(bias) != 1 or not same_size(shape_of(bias)[0], shape_of(weight)[-1]):
            return f"the added tensor has shape {list(shape_of(bias))}, not one entry per output"
    return _Product(x, parameter, not turned, bias)


def _parameter(weight: Node) -> tuple[Node, bool] | None:
    """The parameter behind `weight` and whether it was transposed on the way."""
    if is_parameter(weight):
        return weight, False
    swap = (
        calls(weight, aten.t.default, aten.numpy_T.default)
        or (calls(weight, aten.transpose.int) and {d % 2 for d in weight.args[1:3]} == {0, 1})
        or (calls(weight, aten.permute.default) and [d % 2 for d in weight.args[1]] == [1, 0])
    )
    if swap and is_parameter(weight.args[0]) and rank_of(weight.args[0]) == 2:
        return weight.args[0], True
    return None


def _rewrite(gm: GraphModule, node: Node, product: _Product) -> str | None:
    x, end = product.x, node
    if rank_of(x) < 2:
        return "the input is a single vector"
    if dtype_of(x) != dtype_of(product.parameter):
        return f"input is {dtype_of(x)}, weight {dtype_of(product.parameter)}"
    outer = _around(node, x)
    if outer is not None:
        x, end = outer
    with gm.graph.inserting_before(node):
        weight = _transposed(gm, product.parameter) if product.stored_in_out else product.parameter
        args = (x, weight) if product.bias is None else (x, weight, product.bias)
        fused = insert_call(gm.graph, aten.linear.default, args, like=node)
    replace(end, fused)
    return None


def _around(node: Node, x: Node) -> tuple[Node, Node] | None:
    """Input and output of the views that flatten the tokens before a product and restore them after."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or not calls(user, *_VIEWS) or not calls(x, *_VIEWS):
        return None
    inner = x.args[0]
    if not same_size(shape_of(inner)[-1], shape_of(x)[-1]):
        return None
    restored = (*shape_of(inner)[:-1], shape_of(node)[-1])
    return (inner, user) if same_shape(shape_of(user), restored) else None


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _transposed(gm: GraphModule, parameter: Node) -> Node:
    """A node for the transposed weight, registered under the old name with `_t` behind it."""
    fqn = str(parameter.target)
    name = f"{fqn}_t"
    if get_attribute(gm, name) is None:
        recipe = recipe_of(gm, fqn)
        if not isinstance(recipe, Loaded):
            return insert_call(gm.graph, aten.t.default, (parameter,))
        turned = Loaded(recipe.source, not recipe.transposed)
        register_weight(gm, name, turned, weight_of(gm, fqn).detach().t().contiguous())
    return insert_attribute(gm, name)


def is_linear(node: Any) -> bool:
    """True for `aten.linear` over a matrix parameter."""
    return calls(node, aten.linear.default) and is_parameter(node.args[1])


def linear_bias(node: Node) -> Node | None:
    """Bias of an `aten.linear`, if any."""
    bias = argument(node, 2, "bias")
    return bias if isinstance(bias, fx.Node) else None
