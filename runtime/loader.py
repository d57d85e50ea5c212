"""From a verified artifact to a program on a device: weights moved, linear layers given to the best provider."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.runtime.artifact import Artifact, gpu_obstacle
from qcompiler.runtime.graph import Graph, Node, Ref, Weight, bind
from qcompiler.runtime.program import Program

log = logging.getLogger(__name__)


def choose_device(artifact: Artifact, device: str | torch.device | None) -> torch.device:
    """The device to run on: the one asked for, else a GPU that suits the artifact, else the CPU.

    Raises:
        InvalidInputError: no such device.
        ArtifactError: the GPU asked for is too old, or none that suits is there and the CPU may not serve.
    """
    requirement = artifact.manifest.requires
    if device is None:
        if not torch.cuda.is_available():
            if not requirement.fallback:
                raise ArtifactError("the artifact runs on a GPU only, and this machine has none that torch can use")
            return torch.device("cpu")
        obstacle = gpu_obstacle(requirement, torch.cuda.get_device_capability())
        if obstacle is None:
            return torch.device("cuda", torch.cuda.current_device())
        if not requirement.fallback:
            raise ArtifactError(obstacle)
        log.warning("%s; running on the CPU", obstacle)
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidInputError(f"{device!r} is not a device", hint="Use cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInputError("no CUDA device can be used here", hint="Use --device cpu.")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise InvalidInputError(f"there is no {device}; {torch.cuda.device_count()} CUDA devices are visible")
        obstacle = gpu_obstacle(requirement, torch.cuda.get_device_capability(index))
        if obstacle is not None:
            raise ArtifactError(obstacle, hint="Use --device cpu, or compile for this GPU.")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise InvalidInputError(f"device {device!r} is not supported", hint="Use cpu, cuda or cuda:N.")
    if not requirement.fallback:
        raise ArtifactError("the artifact runs on a GPU only")
    return chosen


def load_program(artifact: Artifact, device: torch.device) -> Program:
    """Read the weights, prepare them for this device, and make the graph runnable.

    Raises:
        ArtifactError: a tensor cannot be read or holds what it must not.
    """
    loader = _Loader(artifact, device)
    nodes = [loader.node(node) for node in artifact.graph.nodes]
    for name in artifact.graph.weights:
        if loader.uses[name] > 0 and name not in loader.weights:
            loader.weights[name] = artifact.read(name, device)
    graph = Graph(
        artifact.graph.kind,
        artifact.graph.inputs,
        list(loader.weights),
        nodes,
        artifact.graph.outputs,
        artifact.graph.written,
    )
    program = Program(graph, loader.weights, device)
    artifact.tensors.close()
    return program


class _Loader:
    def __init__(self, artifact: Artifact, device: torch.device):
        self.artifact = artifact
        self.device = device
        self.weights: dict[str, torch.Tensor] = {}
        # How many nodes still need a weight as it is stored; a prepared one takes its place.
        self.uses: Counter[str] = Counter()
        for node in artifact.graph.nodes:
            self.uses.update(_weights_of((node.args, tuple(node.kwargs.values()))))

    def node(self, node: Node) -> Node:
        """The node itself, or a call of the provider's op on prepared weights."""
        from qcompiler.kernels.providers import select_provider

        if node.target is None or not node.op.startswith("qcompiler.linear_"):
            return node
        call = bind(node)
        names = {part: value.name for part, value in call.items() if isinstance(value, Weight)}
        dynamic = {part: value for part, value in call.items() if isinstance(value, Ref)}
        settings = {part: v for part, v in call.items() if part not in names and part not in dynamic and v is not None}
        tensors = {part: self.artifact.read(name, self.device) for part, name in names.items()}
        provider = select_provider(
            node.op.split(".")[1], settings, tensors, self.device, self.artifact.dtype
        )
        if provider.op is node.target:
            for part, name in names.items():
                self.weights.setdefault(name, tensors[part])
            return node
        prepared, settings = provider.prepare(tensors, settings)
        kwargs: dict[str, Any] = {**dynamic, **settings}
        for part, tensor in prepared.items():
            # A tensor that was left as it is (a bias) keeps its name, so that others share it.
            name = names[part] if tensor is tensors.get(part) else f"{node.name}/{provider.name}/{part}"
            self.weights.setdefault(name, tensor)
            kwargs[part] = Weight(name)
        self.uses.subtract(names.values())
        return _call_by_name(node, provider.op, kwargs)


def _call_by_name(node: Node, op: torch._ops.OpOverload, arguments: dict[str, Any]) -> Node:
    """The same node calling another op; what its schema places first is passed by position."""
    args: list[Any] = []
    rest = dict(arguments)
    for declared in op._schema.arguments:
        if declared.kwarg_only or (declared.name not in rest and not declared.has_default_value()):
            if declared.name not in rest and not declared.kwarg_only:
                args.append(None)  # an optional tensor that is absent
                continue
            break
        args.append(rest.pop(declared.name) if declared.name in rest else declared.default_value)
    return replace(node, op=str(op), target=op, args=tuple(args), kwargs=rest)


def _weights_of(value: Any) -> list[str]:
    if isinstance(value, Weight):
        return [value.name]
    if isinstance(value, tuple):
        return [name for v in value for name in _weights_of(v)]
    return []
