"""Runs a decoded graph: a flat list of steps over numbered slots.

torch.fx would run the same graph through generated Python source; here a step
is a function, its arguments with the slots to fill in, and the slots that are
dead after it. Nodes that depend on weights alone are computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError, QCompilerError
from qcompiler.runtime.graph import Graph, ModelDevice, Node, Ref, Weight
from qcompiler.runtime.opset import SYM_OPS

# A value computed from weights alone is kept if it is a view of one or no larger than this.
_MAX_FOLDED_BYTES = 4 << 20

_Build = Callable[[list[Any]], Any]


class GraphRunError(QCompilerError):
    """An op failed while the graph ran; names the node and the op."""


@dataclass
class _Step:
    name: str
    op: str
    fn: Callable[..., Any]
    out: int
    args: list[Any]
    kwargs: dict[str, Any]
    fill: list[tuple[int, int]] = field(default_factory=list)  # (argument, slot)
    nested: list[tuple[int, _Build]] = field(default_factory=list)  # (argument, list builder)
    keyword: list[tuple[str, _Build]] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)

    def run(self, env: list[Any]) -> None:
        args, kwargs = self.args, self.kwargs
        if self.fill or self.nested:
            args = args.copy()
            for i, slot in self.fill:
                args[i] = env[slot]
            for i, build in self.nested:
                args[i] = build(env)
        if self.keyword:
            kwargs = {**kwargs, **{key: build(env) for key, build in self.keyword}}
        try:
            env[self.out] = self.fn(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except QCompilerError as e:
            raise type(e)(f"node {self.name!r} ({self.op}): {e.message}", hint=e.hint) from e
        except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
            reason = str(e).splitlines()[0][:300] if str(e) else type(e).__name__
            raise GraphRunError(f"node {self.name!r} ({self.op}) failed: {reason}") from e


class Program:
    """A graph with its weights on one device, ready to be called.

    Args:
        graph: What to run.
        weights: Every tensor that the graph names, on `device`.
        device: Stands in for the graph's device arguments.

    Raises:
        ArtifactError: a weight is missing.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], device: torch.device):
        self.graph = graph
        self.device = device
        self._slots: dict[str, int] = {}
        self._initial: list[Any] = []
        self._constant: set[int] = set()
        for declared in graph.inputs:
            self._new_slot(declared.name)
        self._weights: dict[str, int] = {}
        for name, tensor in weights.items():
            slot = self._new_slot(f"weight {name}")
            self._weights[name] = slot
            self._initial[slot] = tensor
            self._constant.add(slot)
        self._steps: list[_Step] = []
        for node in graph.nodes:
            step = self._compile(node)
            if not self._fold(node, step):
                self._steps.append(step)
        self._outputs = [self._slots[o.name] for o in graph.outputs]
        self._inputs = [(i.name, self._slots[i.name]) for i in graph.inputs]
        self._plan_frees()

    def __len__(self) -> int:
        return len(self._steps)

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Run the graph on a value for every graph input, by name; returns its outputs.

        Raises:
            GraphRunError: an op failed.
        """
        env = self._initial.copy()
        for name, slot in self._inputs:
            env[slot] = inputs[name]
        for step in self._steps:
            step.run(env)
            for slot in step.free:
                env[slot] = None
        return [env[slot] for slot in self._outputs]

    def _new_slot(self, name: str) -> int:
        self._slots[name] = len(self._initial)
        self._initial.append(None)
        return self._slots[name]

    def _compile(self, node: Node) -> _Step:
        fn = node.target if node.target is not None else SYM_OPS[node.op][1]
        if node.op == "sym.getitem":
            fn = operator.getitem
        step = _Step(node.name, node.op, fn, self._new_slot(node.name), [], {})
        for i, value in enumerate(node.args):
            constant, build = self._argument(value, step.reads)
            step.args.append(constant)
            if isinstance(value, (Ref, Weight)):
                step.fill.append((i, self._slot_of(value)))
            elif build is not None:
                step.nested.append((i, build))
        for key, value in node.kwargs.items():
            constant, build = self._argument(value, step.reads)
            if build is None:
                step.kwargs[key] = constant
            else:
                step.keyword.append((key, build))
        return step

    def _argument(self, value: Any, reads: set[int]) -> tuple[Any, _Build | None]:
        """A constant, or a function that takes the value from the slots."""
        if isinstance(value, (Ref, Weight)):
            slot = self._slot_of(value)
            reads.add(slot)
            return None, operator.itemgetter(slot)
        if isinstance(value, tuple):
            parts = [self._argument(v, reads) for v in value]
            if all(build is None for _, build in parts):
                return [constant for constant, _ in parts], None
            return None, lambda env: [c if build is None else build(env) for c, build in parts]
        return (self.device if isinstance(value, ModelDevice) else value), None

    def _slot_of(self, value: Ref | Weight) -> int:
        if isinstance(value, Ref):
            return self._slots[value.name]
        if value.name not in self._weights:
            raise ArtifactError(f"weight {value.name!r} is missing")
        return self._weights[value.name]

    @torch.inference_mode()
    def _fold(self, node: Node, step: _Step) -> bool:
        """Compute a node now if it depends on weights alone and nobody writes to its memory later."""
        if not step.reads or not step.reads <= self._constant or node.roots & self.graph.written:
            return False
        if node.target is not None and node.target._schema.is_mutable:
            return False
        step.run(self._initial)
        result = self._initial[step.out]
        parts = result if isinstance(result, (list, tuple)) else [result]
        shared = {
            self._initial[s].untyped_storage().data_ptr()
            for s in step.reads
            if isinstance(self._initial[s], torch.Tensor)
        }
        for part in parts:
            if (
                isinstance(part, torch.Tensor)
                and part.untyped_storage().data_ptr() not in shared
                and part.nbytes > _MAX_FOLDED_BYTES
            ):
                self._initial[step.out] = None
                return False
        self._constant.add(step.out)
        return True

    def _plan_frees(self) -> None:
        last: dict[int, _Step] = {}
        for step in self._steps:
            last[step.out] = step
            for slot in step.reads:
                last[slot] = step
        keep = self._constant | set(self._outputs)
        for slot, step in last.items():
            if slot not in keep:
                step.free.append(slot)
