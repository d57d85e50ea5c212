"""Linears that read the same tensor → one linear over their weights side by side, and a slice for each.

Q, K and V, or gate and up, become one matrix product: fewer launches, and at
few tokens one long read instead of several short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.kernels.formats.base import TensorSpec, get_format
from qcompiler.kernels.formats.calls import stored_weight
from qcompiler.passes.addmm_to_linear import is_linear, linear_bias
from qcompiler.passes.base import Pass, PassResult
from qcompiler.passes.graph_utils import (
    Node,
    aten,
    call_arguments,
    dtype_of,
    insert_attribute,
    insert_call,
    is_parameter,
    op_name,
    rank_of,
    refresh_values,
    replace,
    shape_of,
)
from qcompiler.passes.quantize_linears import is_quantized_linear
from qcompiler.passes.weights import Concat, Recipe, Zeros, layer_name, recipe_of, register_weight, weight_of

# Side by side these would need several tables in one launch: more to read per row, nothing saved in memory.
_TABLES_PER_WEIGHT = frozenset({"additive", "lut4"})


class FuseSiblingLinears(Pass):
    """Merges linears over the same input whose weights have one format, in the order they stand in the graph.

    Biases are laid side by side too; where only some have one, the others get zeros. The sums run
    over the same products in the same groups, so results agree to rounding of the matrix product.
    """

    name = "fuse_sibling_linears"

    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """See the class."""
        groups: dict[tuple[Any, ...], list[_Member]] = {}
        per_input: dict[Node, list[_Member]] = {}
        for node in gm.graph.nodes:
            member = _read(gm, node)
            if member is None:
                continue
            per_input.setdefault(member.x, []).append(member)
            reason = _unfit(member)
            if reason is None:
                groups.setdefault((member.x, member.kind), []).append(member)
            elif len([user for user in member.x.users if _read(gm, user) is not None]) > 1:
                result.skip(node, reason)
        changed: list[Node] = []
        for members in groups.values():
            siblings = per_input[members[0].x]
            if len(members) > 1:
                changed += _merge(gm, members)
                result.matched += 1
                result.launches_saved += len(members) - 1
            elif len(siblings) > 1 and all(
                s.kind != members[0].kind for s in siblings if s is not members[0]
            ):
                result.skip(members[0].node, "its siblings have another format, group size or dtype")
        refresh_values(gm.graph, changed)


class _Member(NamedTuple):
    """A linear; two of equal `kind` can be merged. `tensors` are its weight's stored parts by name."""

    node: Node
    x: Node
    kind: tuple[Any, ...]
    name: str
    tensors: dict[str, Node]
    bias: Node | None
    out_features: int


def _read(gm: GraphModule, node: Node) -> _Member | None:
    if is_linear(node):
        weight: Node = node.args[1]
        kind: tuple[Any, ...] = ("float", dtype_of(weight))
        name = layer_name(str(weight.target))
        return _Member(
            node, node.args[0], kind, name, {"weight": weight}, linear_bias(node), shape_of(weight)[0]
        )
    if not is_quantized_linear(node):
        return None
    call = call_arguments(node)
    weight = stored_weight(op_name(node) or "", call, lambda item: TensorSpec(shape_of(item), dtype_of(item)))
    if weight is None or not all(is_parameter(item) for item in weight.tensors.values()):
        return None
    first = next(iter(weight.tensors.values()))
    kind = (weight.spec, weight.in_features)
    name = str(first.target).rpartition(".")[0]
    return _Member(node, call["x"], kind, name, weight.tensors, call["bias"], shape_of(first)[0])


def _unfit(member: _Member) -> str | None:
    if any(len(item.users) > 1 for item in member.tensors.values()):
        return "its weight is read elsewhere too"
    if getattr(member.kind[0], "name", "") in _TABLES_PER_WEIGHT:
        return "its format keeps tables for each weight"
    if member.bias is not None and not is_parameter(member.bias):
        return "its bias is computed, not a parameter"
    return None


def _merge(gm: GraphModule, members: Sequence[_Member]) -> list[Node]:
    """Replace the members by one linear and slices; returns the slices."""
    graph, first = gm.graph, members[0]
    name = merged_name([member.name for member in members])
    x = first.x
    with graph.inserting_before(first.node):
        tensors = _merged_tensors(gm, name, members)
        bias = _merged_bias(gm, f"{name}.bias", members)
        if first.kind[0] == "float":
            args: tuple[Any, ...] = (x, tensors["weight"]) if bias is None else (x, tensors["weight"], bias)
            op = aten.linear.default
        else:
            spec, in_features = first.kind
            op, args = get_format(spec.name).op_call(spec, x, tensors, bias, in_features)
        merged = insert_call(graph, op, args, like=first.node)
        slices, start = [], 0
        for member in members:
            end = start + member.out_features
            part = insert_call(
                graph, aten.slice.Tensor, (merged, rank_of(merged) - 1, start, end), like=member.node
            )
            slices.append(part)
            start = end
    for member, part in zip(members, slices, strict=True):
        replace(member.node, part)
    return slices


def merged_name(names: Sequence[str]) -> str:
    """Name of a merged layer: common parent and joined own names: `….mlp.gate_proj_and_up_proj`."""
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    tails = ["_".join(parts[depth:]) for parts in split]
    return ".".join([*split[0][:depth], "_and_".join(tails)])


def _merged_tensors(gm: GraphModule, name: str, members: Sequence[_Member]) -> dict[str, Node]:
    held = [{part: weight_of(gm, str(n.target)) for part, n in m.tensors.items()} for m in members]
    first = members[0]
    if first.kind[0] == "float":
        joined = {"weight": torch.cat([parts["weight"].detach() for parts in held])}
    else:
        spec = first.kind[0]
        joined = get_format(spec.name).concat(spec, held)
    nodes = {}
    for part, tensor in joined.items():
        dim = next(d for d in range(tensor.dim()) if tensor.shape[d] != held[0][part].shape[d])
        recipes = tuple(recipe_of(gm, str(member.tensors[part].target)) for member in members)
        register_weight(gm, f"{name}.{part}", Concat(recipes, dim), tensor)
        nodes[part] = insert_attribute(gm, f"{name}.{part}")
    return nodes


def _merged_bias(gm: GraphModule, fqn: str, members: Sequence[_Member]) -> Node | None:
    dtype = next((dtype_of(member.bias) for member in members if member.bias is not None), None)
    if dtype is None:
        return None
    recipes: list[Recipe] = []
    tensors = []
    meta = any(m.bias is not None and weight_of(gm, str(m.bias.target)).is_meta for m in members)
    for member in members:
        if member.bias is None:
            recipes.append(Zeros((member.out_features,), dtype))
            tensors.append(torch.zeros(member.out_features, dtype=dtype, device="meta" if meta else None))
        else:
            recipes.append(recipe_of(gm, str(member.bias.target)))
            tensors.append(weight_of(gm, str(member.bias.target)).detach())
    register_weight(gm, fqn, Concat(tuple(recipes)), torch.cat(tensors))
    return insert_attribute(gm, fqn)
