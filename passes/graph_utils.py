"""Small tools on FX graphs that every pass uses: new nodes with fake values, parameters, shapes, slices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompiler.kernels.errors import PassError

aten = torch.ops.aten

if TYPE_CHECKING:
    # fx types an argument of a node as a union of everything; matchers know it by the op's schema.
    Node = Any
else:
    from torch.fx import Node

_RECIPES = "weight_recipes"


# ── values ────────────────────────────────────────────────────────────────────


def value(node: Node) -> Any:
    """The fake value of `node` (tensor, tuple of tensors or symbolic integer).

    Raises:
        PassError: The graph carries no values, e.g. it was traced without torch.export.
    """
    if "val" not in node.meta:
        raise PassError(
            f"node {node.name} has no meta['val']",
            hint="Passes need shapes and dtypes: make the graph with torch.export.export(...).module().",
        )
    return node.meta["val"]


def is_tensor(node: Any) -> bool:
    """True if `node` is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_of(node: Node) -> torch.dtype:
    """Element type of the tensor that `node` yields."""
    return value(node).dtype


def shape_of(node: Node) -> torch.Size:
    """Shape of the tensor that `node` yields; entries may be symbolic."""
    return value(node).shape


def rank_of(node: Node) -> int:
    """Number of dimensions of the tensor that `node` yields."""
    return len(shape_of(node))


def last_dim(node: Node) -> int | None:
    """Size of the last dimension, or None if the tensor has none or it is symbolic."""
    shape = shape_of(node)
    return shape[-1] if len(shape) and isinstance(shape[-1], int) else None


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """True if two shapes are known to be equal without adding a guard."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_size(a: Any, b: Any) -> bool:
    """True if two sizes, each an integer or symbolic, are known to be equal."""
    return a is b or bool(statically_known_true(a == b))


def fake_mode(graph: Graph) -> FakeTensorMode | None:
    """The fake tensor mode that the graph's values belong to, if any."""
    for node in graph.nodes:
        for item in _tensors(node.meta.get("val")):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    return None


def graph_device(graph: Graph) -> torch.device:
    """The device that the graph's values claim to be on: that of its first tensor input."""
    for node in graph.nodes:
        for item in _tensors(node.meta.get("val")):
            return item.device
    return torch.device("meta")


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)


# ── nodes ─────────────────────────────────────────────────────────────────────


def calls(node: Any, *targets: Callable[..., Any]) -> bool:
    """True if `node` calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of `node`, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def other(pair: tuple[Any, Any], one: Any) -> Any:
    """The element of `pair` that is not `one`."""
    return pair[1] if pair[0] is one else pair[0]


def insert_call(
    graph: Graph,
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: Node | None = None,
) -> Node:
    """Insert a call at the graph's insertion point and fill its `meta["val"]`.

    Args:
        graph: Where; set the place with `graph.inserting_before/after`.
        op: An OpOverload, or a Python function such as `operator.getitem`.
        args: Arguments; nodes inside must carry values.
        kwargs: Keyword arguments.
        like: The node that this one stands in for; its module stack and stack trace are kept.
    """
    node = graph.call_function(op, args, kwargs or {})
    node.meta["val"] = compute_value(node)
    if like is not None:
        inherit(node, like)
    return node


def inherit(node: Node, like: Node) -> None:
    """Copy where `like` came from (module stack, stack trace) to `node`."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
        if key in like.meta:
            node.meta.setdefault(key, like.meta[key])


def compute_value(node: Node) -> Any:
    """The fake value that the call `node` gives for the values of its arguments."""
    mode = fake_mode(node.graph)

    def lower(item: Any) -> Any:
        val = value(item)
        if mode is not None and isinstance(val, torch.Tensor) and not isinstance(val, FakeTensor):
            return mode.from_tensor(val, static_shapes=True)
        return val

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lower)
    if not callable(node.target):
        raise PassError(f"node {node.name} calls {node.target!r}, which is not a function")
    if mode is None:
        return node.target(*args, **kwargs)
    # torch 2.11 needs the Python decompositions: its own of aten.linear asks for concrete sizes.
    with mode, enable_python_dispatcher(), torch.no_grad():
        return node.target(*args, **kwargs)


def refresh_values(graph: Graph, changed: Iterable[Node]) -> None:
    """Recompute the values of everything that reads `changed`, as far as shapes, strides or dtypes move.

    Views that no longer exist for the new strides become reshapes.
    """
    dirty = set(changed)
    for node in graph.nodes:
        if node.op != "call_function" or not dirty.intersection(node.all_input_nodes):
            continue
        old = node.meta.get("val")
        try:
            new = compute_value(node)
        except (RuntimeError, ValueError):
            if node.target is not aten.view.default:
                raise
            node.target = aten.reshape.default
            new = compute_value(node)
        if _layout(new) != _layout(old):
            node.meta["val"] = new
            dirty.add(node)


def _layout(item: Any) -> Any:
    return [(tuple(map(str, t.shape)), tuple(map(str, t.stride())), t.dtype) for t in _tensors(item)]


def replace(old: Node, new: Node) -> None:
    """Let every reader of `old` read `new`; `old` is left to dead code elimination."""
    inherit(new, old)
    old.replace_all_uses_with(new)


def precedes(a: Node, b: Node) -> bool:
    """True if `a` stands before `b` in the graph."""
    return a < b


def module_path(node: Node) -> str:
    """Path of the innermost module that the node came from, or an empty string."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def is_mutated(node: Node) -> bool:
    """True if the storage of `node`, or a view of it, is written to by an in-place op of the graph."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        todo += aliased_inputs(item)
        for user in item.users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable and item in written_inputs(user):
                return True
            if item in aliased_inputs(user):
                todo.append(user)
    return False


def written_inputs(node: Node) -> list[Node]:
    """Inputs that an in-place call writes to."""
    return [arg for arg, info in _schema_inputs(node) if info is not None and info.is_write]


def aliased_inputs(node: Node) -> list[Node]:
    """Inputs whose storage the result of `node` may share."""
    if calls(node, operator.getitem):
        parent, index = node.args
        twins = [user for user in parent.users if calls(user, operator.getitem) and user.args[1] == index]
        return [parent] if aliased_inputs(parent) or len(twins) > 1 else []
    if calls(node, *_MAYBE_ALIAS):
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    return [arg for arg, info in _schema_inputs(node) if info is not None]


# Composite ops that may hand back their input but whose schema does not say so.
_MAYBE_ALIAS = (
    aten.reshape.default, aten.contiguous.default, aten.dropout.default, aten.flatten.using_ints,
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
)  # fmt: skip


def _schema_inputs(node: Node) -> Iterator[tuple[Node, Any]]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    for position, spec in enumerate(schema.arguments):
        item = argument(node, position, spec.name)
        for arg in item if isinstance(item, (list, tuple)) else (item,):
            if isinstance(arg, fx.Node):
                yield arg, spec.alias_info


# ── attributes: parameters, buffers, constants ────────────────────────────────


def is_parameter(node: Any) -> bool:
    """True if `node` reads a tensor held by the graph module."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and is_tensor(node)


def get_attribute(gm: GraphModule, fqn: str) -> Any:
    """The parameter, buffer, constant or submodule named `fqn`; None if there is none."""
    item: Any = gm
    for part in fqn.split("."):
        item = getattr(item, part, None)
        if item is None:
            return None
    return item


def set_attribute(gm: GraphModule, fqn: str, tensor: torch.Tensor) -> None:
    """Hold `tensor` as a buffer named `fqn`, making the modules on the way.

    Raises:
        PassError: Something on the way is no module.
    """
    *parents, name = fqn.split(".")
    module: torch.nn.Module = gm
    for part in parents:
        child = getattr(module, part, None)
        if child is None:
            child = torch.nn.Module()
            module.add_module(part, child)
        if not isinstance(child, torch.nn.Module):
            raise PassError(f"cannot register {fqn}: {part} is already a {type(child).__name__}")
        module = child
    if name in module._parameters:
        del module._parameters[name]
    if hasattr(module, name) and name not in module._buffers:
        raise PassError(f"cannot register {fqn}: the name is taken")
    module.register_buffer(name, tensor.detach())


def remove_attribute(gm: GraphModule, fqn: str) -> None:
    """Let go of the tensor named `fqn`; nodes that read it must be replaced before the graph is linted."""
    owner, _, name = fqn.rpartition(".")
    delattr(gm.get_submodule(owner), name)


def insert_attribute(gm: GraphModule, fqn: str) -> Node:
    """Insert a node that reads the tensor `fqn` at the insertion point, with its value filled."""
    graph = gm.graph
    node = graph.create_node("get_attr", fqn, (), {}, name=fqn.replace(".", "_"))
    tensor = get_attribute(gm, fqn)
    mode, device = fake_mode(graph), graph_device(graph)
    if mode is None:
        node.meta["val"] = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
    else:
        with mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
    return node


def drop_unused_attributes(gm: GraphModule) -> list[str]:
    """Remove tensors and submodules that no node reads; their recipes go with them.

    Returns:
        Names of the tensors removed.
    """
    kept = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    ancestors = {name[:i] for name in kept for i, c in enumerate(name) if c == "."}
    dropped: list[str] = []

    def visit(module: torch.nn.Module, prefix: str) -> None:
        constants = [name for name, item in vars(module).items() if isinstance(item, torch.Tensor)]
        for name in [*module._parameters, *module._buffers, *constants]:
            if prefix + name not in kept:
                dropped.append(prefix + name)
                delattr(module, name)
        for name, child in list(module.named_children()):
            if prefix + name in kept:  # called as a whole
                continue
            if prefix + name in ancestors:
                visit(child, f"{prefix}{name}.")
            else:
                dropped.extend(f"{prefix}{name}.{key}" for key in child.state_dict())
                delattr(module, name)

    visit(gm, "")
    recipes = gm.meta.get(_RECIPES, {})
    for name in [name for name in recipes if get_attribute(gm, name) is None]:
        del recipes[name]
    return dropped


# ── patterns that many passes share ───────────────────────────────────────────


class Span(NamedTuple):
    """`source[..., start:end:step]`, `size` being the source's last dimension."""

    source: Node
    start: int
    end: int
    step: int
    size: int


def last_dim_span(node: Any) -> Span | None:
    """Read a slice, narrow, chunk or split along the last dimension; None if `node` is none of these."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    if calls(node, aten.slice.Tensor, aten.narrow.default):
        source = node.args[0]
        size, dim = last_dim(source), argument(node, 1, "dim", 0)
        if size is None or dim % rank_of(source) != rank_of(source) - 1:
            return None
        start = argument(node, 2, "start", 0) or 0
        if node.target is aten.narrow.default:
            end, step = start + node.args[3], 1
        else:
            end, step = argument(node, 3, "end", size), argument(node, 4, "step", 1)
            end = size if end is None else end
        if not all(isinstance(i, int) for i in (start, end, step)):
            return None
        start, end = (max(i + size, 0) if i < 0 else min(i, size) for i in (start, end))
        return Span(source, start, end, step, size)
    if calls(node, operator.getitem) and calls(node.args[0], *_SPLITS):
        parent, index = node.args
        source = parent.args[0]
        size, dim = last_dim(source), argument(parent, 2, "dim", 0)
        if size is None or dim % rank_of(source) != rank_of(source) - 1:
            return None
        sizes = [part.shape[-1] for part in value(parent)]
        index %= len(sizes)
        return Span(source, sum(sizes[:index]), sum(sizes[: index + 1]), 1, size)
    return None


_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default)


def through_casts(node: Node) -> Node:
    """Follow float → float dtype conversions back to what they read."""
    while calls(node, aten.to.dtype, aten._to_copy.default) and is_tensor(node.args[0]):
        if not (dtype_of(node).is_floating_point and dtype_of(node.args[0]).is_floating_point):
            break
        node = node.args[0]
    return node


def single_reader(node: Node, *inner: Node) -> bool:
    """True if only nodes of `inner` read `node`."""
    return all(user in inner for user in node.users)


# ── the graph's inputs ────────────────────────────────────────────────────────


def plain_signature(gm: GraphModule) -> None:
    """Make the graph's placeholders its positional arguments and its output what it returns.

    torch.export's modules flatten their inputs by a recorded tree and check them in a hook, which
    inputs added by a pass would not fit. A single output stays a single tensor.
    """
    graph = gm.graph
    for key, hook in list(gm._forward_pre_hooks.items()):
        if getattr(hook, "__name__", "") == "_check_input_constraints_pre_hook":
            del gm._forward_pre_hooks[key]
            gm._forward_pre_hooks_with_kwargs.pop(key, None)
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None:
        return
    leaf = info.out_spec is None or info.out_spec.is_leaf()
    graph.set_codegen(torch.fx.graph.CodeGen())
    output = graph.output_node()
    (results,) = output.args
    if leaf and isinstance(results, (list, tuple)) and len(results) == 1:
        output.args = (results[0],)


def output_node_values(graph: Graph) -> list[Node]:
    """The nodes that the graph returns, flattened."""
    results: Any = graph.output_node().args[0]
    return [results] if isinstance(results, fx.Node) else [r for r in results if isinstance(r, fx.Node)]


def op_name(node: Any) -> str | None:
    """Name of the `qcompiler::` op that a node calls, without namespace and overload; else None."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "qcompiler":
        return target._schema.name.partition("::")[2]
    return None


def call_arguments(node: Node) -> dict[str, Any]:
    """A node's arguments by the names in its op's schema."""
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
