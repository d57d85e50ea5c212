"""From one Dynamo graph to a callable: trace, passes, stored tensors as inputs, the rest to the compiler."""

from __future__ import annotations

import copy
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._guards import TracingContext
from torch.fx import GraphModule

from qcompiler.backend.lift import lift, read_tensors
from qcompiler.backend.options import BackendOptions
from qcompiler.backend.trace import Traced, trace
from qcompiler.backend.weights import WEIGHTS, Maker, version
from qcompiler.kernels.errors import PassError
from qcompiler.passes import (
    AddmmToLinear,
    Functionalize,
    FuseAddNorm,
    FuseSiblingLinears,
    InlineSubgraphs,
    MergeCommonSubexpressions,
    Pass,
    PassManager,
    PassResult,
    QuantizeLinears,
    QuantizeResult,
    RemoveAsserts,
    RemoveNoOps,
    SelectKernels,
    canonical_passes,
)
from qcompiler.passes.graph_utils import Node, aten, calls, get_attribute, is_parameter, set_attribute
from qcompiler.passes.weights import Quantized, layer_name, recipe_of, weight_recipes

log = logging.getLogger(__name__)

# What `AddmmToLinear` and the quantization need, when fusing is left to the compiler.
_TIDY: tuple[type[Pass], ...] = (
    InlineSubgraphs, RemoveAsserts, Functionalize, RemoveNoOps, MergeCommonSubexpressions, AddmmToLinear,
)  # fmt: skip


@dataclass
class GraphReport:
    """What the backend did to one graph.

    Attributes:
        quantized: Names of the linears that run on stored codes.
        skipped: (linear, reason) of those that do not.
        passes: The result of each pass, in order.
    """

    quantized: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    passes: list[PassResult] = field(default_factory=list)


class Backend:
    """A backend for `torch.compile` with its options checked now rather than at the first call.

    Args:
        options: See `BackendOptions`.

    Attributes:
        options: The checked options.
        reports: One for each graph compiled, in order.

    Raises:
        InvalidInputError: An option that does not exist or has a wrong value.
    """

    def __init__(self, **options: Any):
        self.options = BackendOptions.of(**options)
        self.reports: list[GraphReport] = []

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs.

        Raises:
            InvalidInputError: A weight cannot be quantized, or an input wants a gradient.
            UnsupportedModelError: Autocast is on.
        """
        traced = trace(gm, example_inputs)
        report = self._rewrite(traced.graph)
        self.reports.append(report)
        log.info("%d linears quantized, %d left as they are", len(report.quantized), len(report.skipped))
        program = _Program(traced, self.options)
        lowered, tensors = program.lower([example_inputs[i] for i in traced.parameters.values()])
        stored = lift(lowered, traced, tensors, gm)
        run = self._compile(
            lowered, [example_inputs[i] for i in traced.inputs], [tensors[name] for name in stored]
        )
        return _Compiled(program, run, stored, tensors, example_inputs)

    def _rewrite(self, graph: GraphModule) -> GraphReport:
        quantize = QuantizeLinears(self._chooser(graph))
        quantize.required = False  # a graph between two breaks may have no linear
        tidy = canonical_passes() if self.options.fuse else [kind() for kind in _TIDY]
        fusions: list[Pass] = [FuseSiblingLinears(), FuseAddNorm()] if self.options.fuse else []
        results = PassManager([*tidy, quantize, *fusions]).run(graph)
        report = GraphReport(passes=results)
        for result in results:
            if isinstance(result, QuantizeResult):
                report.quantized = [layer.name for layer in result.quantized]
                report.skipped = [(skip.node, skip.reason) for skip in result.skipped]
        return report

    def _chooser(self, graph: GraphModule) -> Callable[[str, int, int], Any]:
        method, spec, _ = self.options.resolved()
        tied = {
            layer_name(str(node.args[0].target))
            for node in _calls(graph, aten.embedding.default)
            if is_parameter(node.args[0])
        }

        def choose(name: str, _rows: int, _columns: int) -> Any:
            if spec is None:
                return f"method {method.name}"
            if name in tied:
                return "tied to an embedding"
            return self.options.skip_reason(name) or spec

        return choose

    def _compile(
        self, lowered: GraphModule, inputs: Sequence[Any], stored: Sequence[torch.Tensor]
    ) -> Callable[..., Any]:
        if self.options.compiler == "eager":
            return lowered
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        chosen = list_mode_options(self.options.mode) if self.options.mode else {}
        patches = {**chosen, **self.options.inductor}
        # Dynamo knows which sizes of its own inputs vary; those of stored tensors never do.
        context = TracingContext.try_get()
        mode = None if context is None else context.fake_mode
        fixed = [t if mode is None else mode.from_tensor(t, static_shapes=True) for t in stored]
        compiled: Any = compile_fx(lowered, [*inputs, *fixed], config_patches=patches or None)
        return compiled


class _Program:
    """A rewritten graph whose weights are recipes, to be lowered for a set of parameters."""

    def __init__(self, traced: Traced, options: BackendOptions):
        self.graph = traced.graph
        self.names = list(traced.parameters)
        self.positions = list(traced.parameters.values())
        self.options = options
        self._method, self._spec, self._settings = options.resolved()

    def lower(self, parameters: Sequence[torch.Tensor]) -> tuple[GraphModule, dict[str, torch.Tensor]]:
        """The graph for these parameters, and every tensor that it reads by name.

        Args:
            parameters: Real tensors, in the order of `names`.
        """
        real = dict(zip(self.names, parameters, strict=True))
        settings = (self._method.name, self._spec, tuple(sorted(self._settings.items())))
        graph = copy.deepcopy(self.graph)
        weight_recipes(graph).update(weight_recipes(self.graph))
        with torch.no_grad():
            maker = Maker(WEIGHTS, real, self._quantize, settings)
            before = read_tensors(graph)
            for name in before:
                if get_attribute(graph, name).is_meta:  # else a tensor that the user's code writes out
                    set_attribute(graph, name, maker.tensor(recipe_of(graph, name)))
            if parameters and all(tensor.device.type == "cpu" for tensor in parameters):
                SelectKernels("cpu", lean=self.options.lean).run(graph)
            tensors = {name: get_attribute(graph, name) for name in read_tensors(graph)}
            for name in tensors.keys() - set(before):
                # Repacked for a kernel: a second graph over the same parameters shares the tensor.
                packed: torch.Tensor = tensors[name]
                facts = (tuple(packed.shape), packed.dtype, self.options.lean)
                key = ("prepared", name, tuple(self.names), facts, settings)
                tensors[name] = WEIGHTS.once(key, real, partial(_itself, packed))
        return graph, tensors

    def _quantize(self, recipe: Quantized, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._method.quantize(weight.contiguous(), recipe.spec, self._settings, name=recipe.name)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Stored:
    """The stored tensors that stand for one set of parameters."""

    def __init__(self, positions: Sequence[int], parameters: Sequence[Any], tensors: list[torch.Tensor]):
        self.tensors = tensors
        self._generation = WEIGHTS.generation
        self._known = [
            (position, weakref.ref(parameter), version(parameter))
            for position, parameter in zip(positions, parameters, strict=True)
        ]

    def serves(self, args: Sequence[Any]) -> bool:
        """True if `args` hold these very parameters, unchanged."""
        if self._generation != WEIGHTS.generation:
            return False
        for position, known, known_version in self._known:
            parameter: torch.Tensor = args[position]
            if known() is not parameter or version(parameter) != known_version:
                return False
        return True

    def dead(self) -> bool:
        """True if a parameter is gone."""
        return any(known() is None for _, known, _ in self._known)


class _Compiled:
    """What Dynamo calls: takes its flat inputs, gives the graph's outputs.

    One graph serves all modules of a kind, so the parameters of a call may be others than those
    that it was compiled with; their stored tensors are made at their first call.
    """

    def __init__(
        self, program: _Program, run: Callable[..., Any], names: list[str], tensors: dict[str, torch.Tensor],
        example_inputs: Sequence[Any],
    ):  # fmt: skip
        self._program, self._run, self._names = program, run, names
        held = set(program.positions)
        self._inputs = [i for i in range(len(example_inputs)) if i not in held]
        self._lock = threading.Lock()
        self._all: dict[tuple[int, ...], _Stored] = {}
        self._latest = self._add([example_inputs[i] for i in program.positions], tensors)

    def __call__(self, *args: Any) -> Any:
        stored = self._latest
        if not stored.serves(args):
            stored = self._latest = self._find(args)
        return self._run(*[args[i] for i in self._inputs], *stored.tensors)

    def _find(self, args: Sequence[Any]) -> _Stored:
        parameters = [args[i] for i in self._program.positions]
        with self._lock:
            stored = self._all.get(tuple(map(id, parameters)))
            if stored is None or not stored.serves(args):
                stored = self._add(parameters, self._program.lower(parameters)[1])
            return stored

    def _add(self, parameters: Sequence[Any], tensors: dict[str, torch.Tensor]) -> _Stored:
        if set(tensors) != set(self._names):
            raise PassError("other parameters of the same shapes were lowered to other tensors")
        for key in [key for key, stored in self._all.items() if stored.dead()]:
            del self._all[key]
        stored = _Stored(self._program.positions, parameters, [tensors[name] for name in self._names])
        self._all[tuple(map(id, parameters))] = stored
        return stored


def _calls(gm: GraphModule, op: Any) -> list[Node]:
    return [node for node in gm.graph.nodes if calls(node, op)]
