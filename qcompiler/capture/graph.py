"""Turns torch.export's program into the plain graph that passes work on.

Parameters become `get_attr` nodes named as in the state dict, nested graphs
(autocast off, no_grad) are inlined, assertions and no-ops of evaluation mode
are dropped, and nothing dead remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from qcompiler.capture import inplace
from qcompiler.kernels.errors import UnsupportedModelError

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# Identities outside of training; argument 0 takes their place.
_IDENTITIES = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default}
_DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default}
_CASTS = {
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
}


class GraphBuilder:
    """Copies an exported program node by node into a graph module with state-dict names.

    Args:
        program: What torch.export returned for a wrapper that holds the model as attribute `prefix`.
        prefix: Attribute name of the model in the exported wrapper.
        canonical: Parameter or buffer name → the one name under which it is kept (tied weights).
        tensors: Canonical name → the tensor to hold: meta for weights, real for computed buffers.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        prefix: str,
        canonical: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
    ):
        self.program = program
        self.prefix = prefix
        self.canonical = canonical
        self.tensors = tensors
        self.graph = fx.Graph()
        self.attributes: dict[str, torch.Tensor] = {}
        self._attribute_nodes: dict[str, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        """The cleaned graph module, linted, with `meta["val"]` on every node.

        Raises:
            UnsupportedModelError: The program holds something with no place in such a graph.
        """
        env: dict[fx.Node, Any] = {}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                env[node] = self.graph.node_copy(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                name = self.canonical[spec.target.removeprefix(f"{self.prefix}.")]
                env[node] = _Attribute(name, self.tensors[name], node.meta)
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                constant = self.program.constants[spec.target]
                if constant.is_meta and constant.numel():
                    raise UnsupportedModelError(
                        f"its forward makes a constant ({node.name}) whose value is lost"
                    )
                env[node] = _Attribute(spec.target.replace(f"{self.prefix}.", "", 1), constant, node.meta)
            else:
                raise UnsupportedModelError(f"the exported program takes an input of kind {spec.kind.name}")
        self._copy(self.program.graph_module, env)
        gm = fx.GraphModule(self.attributes, self.graph)
        gm.graph.eliminate_dead_code()
        inplace.fuse_slice_writes(gm.graph)
        _drop_unused_attributes(gm)
        gm.graph.lint()
        gm.recompile()
        return gm

    def _copy(self, owner: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        """Copy the nodes of one (nested) graph; returns what it outputs, in our nodes."""
        for node in owner.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: self._value(env[n]))
                if owner is self.program.graph_module:
                    self.graph.output(result[0] if isinstance(result, (tuple, list)) else result)
                return result
            env[node] = self._step(owner, node, env)
        return None

    def _step(self, owner: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            held = getattr(owner, str(node.target))
            if isinstance(held, fx.GraphModule):
                return held
            return _Attribute(str(node.target), held, node.meta)
        target = node.target
        if target in _ASSERTIONS:
            return None
        if target in _IDENTITIES or _is_idle_dropout(node):
            return env[_node(node.args[0])]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(node, env)
        if getattr(target, "__name__", "") == "getitem" and isinstance(
            env[_node(node.args[0])], (tuple, list)
        ):
            return env[_node(node.args[0])][node.args[1]]
        if target in _CASTS:
            return self._cast(node, env)
        if inplace.mutates(node):
            return self._mutation(node, env)
        if target is aten.cat.default:
            return self._cat(node, env)
        copied = self.graph.node_copy(node, lambda n: self._value(env[n]))
        self._rename_stack(copied)
        return copied

    def _cast(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """All tensors live on one device, so a move is a cast, and a cast to the same dtype nothing."""
        source = _node(node.args[0])
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        if before == after:
            return env[source]
        copied = self.graph.call_function(aten.to.dtype, (self._value(env[source]), after))
        copied.meta = dict(node.meta)
        self._rename_stack(copied)
        return copied

    def _cat(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """A cat without its empty parts (the cache of a model that keeps one regardless of use_cache)."""
        given: Any = node.args[0]
        parts = [part for part in given if not _is_empty(part.meta["val"])]
        if len(parts) == 1:
            return env[parts[0]]
        copied = self.graph.node_copy(node, lambda n: self._value(env[n]) if n in parts else n)
        copied.args = ([self._value(env[part]) for part in parts], *copied.args[1:])
        self._rename_stack(copied)
        return copied

    def _mutation(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """An in-place op as a function, its result in the place of what it wrote to."""
        written = _node(node.args[0])
        sliced = inplace.written_slice(node)
        if sliced is not None:
            return self._slice_write(node, sliced, env)
        target = inplace.functional(node)
        if target is None:
            raise UnsupportedModelError(f"its forward changes a tensor in place by {node.target}")
        inplace.check_no_other_view(node)
        args = fx.map_arg(node.args, lambda n: self._value(env[n]))
        kwargs = fx.map_arg(node.kwargs, lambda n: self._value(env[n]))
        if target is aten.copy.default and node.args[1].meta["val"].dtype == written.meta["val"].dtype:  # type: ignore[union-attr]
            target, args = aten.expand.default, (args[1], _sizes(written, env))
        if target is aten.zeros_like.default:
            args = args[:1]
        copied = self.graph.call_function(target, args, kwargs)
        copied.meta = dict(node.meta)
        self._rename_stack(copied)
        env[written] = copied
        return copied

    def _slice_write(self, node: fx.Node, sliced: fx.Node, env: dict[fx.Node, Any]) -> Any:
        base, dim, start, stop = (*sliced.args, *(0, None, None)[len(sliced.args) - 1 :])[:4]
        base, value = _node(base), _node(node.args[1])
        shape, source = sliced.meta["val"].shape, value.meta["val"]
        if source.shape != shape or source.dtype != sliced.meta["val"].dtype:
            raise UnsupportedModelError(
                f"its forward writes {tuple(source.shape)} into a slice of {tuple(shape)}"
            )
        scattered = self.graph.call_function(
            aten.slice_scatter.default, (self._value(env[base]), self._value(env[value]), dim, start, stop)
        )
        scattered.meta = {**node.meta, "val": base.meta["val"]}
        length = base.meta["val"].shape[dim]
        scattered.meta["stop"] = length if stop is None or stop > length else stop
        self._rename_stack(scattered)
        env[base] = scattered
        return env.get(sliced)

    def _inline(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        name = str(node.target)
        if name == "wrap_with_set_grad_enabled":
            nested, inputs = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast":
            if node.args[2]:
                raise UnsupportedModelError("the model turns autocast on in its forward")
            nested, inputs = node.args[4], node.args[5:]
        else:
            raise UnsupportedModelError(
                f"the model's forward needs {name}, control flow that depends on the data"
            )
        module = env[_node(nested)]
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        inner_env: dict[fx.Node, Any] = {
            place: env[value] if isinstance(value, fx.Node) else value
            for place, value in zip(inner, inputs, strict=True)
        }
        return self._copy(module, inner_env)

    def _value(self, value: Any) -> Any:
        if isinstance(value, _Attribute):
            return self._attribute(value)
        return value

    def _attribute(self, attribute: _Attribute) -> fx.Node:
        if attribute.name not in self._attribute_nodes:
            # as torch would have it: unique, and none of them shadowing another
            self.attributes[attribute.name] = attribute.tensor
            fresh = self.graph.create_node("get_attr", attribute.name)
            fresh.meta["val"] = attribute.meta["val"]
            self._attribute_nodes[attribute.name] = fresh
        return self._attribute_nodes[attribute.name]

    def _rename_stack(self, node: fx.Node) -> None:
        """Module paths in `nn_module_stack` as in the state dict, without the wrapper."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return
        renamed = {}
        for key, (path, kind) in stack.items():
            parts = path.split(".")
            if self.prefix in parts:
                renamed[key] = (".".join(parts[parts.index(self.prefix) + 1 :]), kind)
        node.meta["nn_module_stack"] = renamed


class _Attribute:
    """A tensor that becomes a `get_attr` node when something uses it."""

    def __init__(self, name: str, tensor: torch.Tensor, meta: dict[str, Any]):
        self.name = name
        self.tensor = tensor
        self.meta = meta


def _node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise UnsupportedModelError(f"the exported graph holds {value!r} where a value was expected")
    return value


def _is_empty(value: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tuple(value.shape))


def _sizes(node: fx.Node, env: dict[fx.Node, Any]) -> list[Any]:
    sizes = list(node.meta["val"].shape)
    if not all(isinstance(size, int) for size in sizes):
        raise UnsupportedModelError(
            f"its forward overwrites {node.name}, whose size depends on the number of tokens"
        )
    return sizes


def _is_idle_dropout(node: fx.Node) -> bool:
    if node.target not in _DROPOUTS:
        return False
    _, probability, training = node.args
    return training is False or bool(probability == 0.0)


def _drop_unused_attributes(gm: fx.GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for module_path, module in list(gm.named_modules()):
        for store in (module._parameters, module._buffers):
            for leaf in list(store):
                if (f"{module_path}.{leaf}" if module_path else leaf) not in used:
                    del store[leaf]
