"""From a verified artifact to a program on a device: weights moved, linears given to a provider."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.kernels.providers import select_provider
from qcompiler.runtime.artifact import Artifact, gpu_obstacle
from qcompiler.runtime.graph import Graph, Node, Ref, Weight, bind
from qcompiler.runtime.kv_bits import with_kv_bits
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
                raise ArtifactError(
                    "the artifact runs on a GPU only, and this machine has none that torch can use"
                )
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
    except (RuntimeError, TypeError):
        raise InvalidInputError(f"{device!r} is not a device", hint="Use cpu, cuda or cuda:N.") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInputError("no CUDA device can be used here", hint="Use --device cpu.")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise InvalidInputError(
                f"there is no {device}; {torch.cuda.device_count()} CUDA devices are visible"
            )
        obstacle = gpu_obstacle(requirement, torch.cuda.get_device_capability(index))
        if obstacle is not None:
            raise ArtifactError(obstacle, hint="Use --device cpu, or compile for this GPU.")
        return torch.device("cuda", index)
    if chosen.type != "cpu":
        raise InvalidInputError(f"device {device!r} is not supported", hint="Use cpu, cuda or cuda:N.")
    if not requirement.fallback:
        raise ArtifactError("the artifact runs on a GPU only")
    return chosen


def load_program(
    artifact: Artifact, device: torch.device, *, lean: bool = False, kv_bits: str | int | None = None
) -> Program:
    """Read the weights, prepare them for this device, and make the graph runnable.

    Args:
        artifact: A verified artifact.
        device: Where the weights go.
        lean: See `qcompiler.kernels.providers.select_provider`.
        kv_bits: See `qcompiler.runtime.kv_bits.with_kv_bits`.

    Raises:
        ArtifactError: a tensor cannot be read or holds what it must not.
        InvalidInputError: the cache cannot have so many bits.
    """
    try:
        return _program(artifact, device, lean=lean, kv_bits=kv_bits)
    finally:
        artifact.tensors.close()


def _program(artifact: Artifact, device: torch.device, *, lean: bool, kv_bits: str | int | None) -> Program:
    source = with_kv_bits(artifact.graph, kv_bits)
    loader = _Loader(artifact, device, lean)
    nodes = [loader.node(node) for node in source.nodes]
    for name in artifact.graph.weights:
        if loader.uses[name] > 0 and name not in loader.weights:
            loader.weights[name] = artifact.read(name, device)
    graph = Graph(
        source.kind,
        source.inputs,
        list(loader.weights),
        nodes,
        source.outputs,
        source.written,
    )
    return Program(graph, loader.weights, device)


class _Loader:
    def __init__(self, artifact: Artifact, device: torch.device, lean: bool):
        self.artifact = artifact
        self.device = device
        self.lean = lean
        self.weights: dict[str, torch.Tensor] = {}
        # How many nodes still need a weight as it is stored; a prepared one takes its place.
        self.uses: Counter[str] = Counter()
        self.experts = {
            tensor: layer.experts for layer in artifact.manifest.layers for tensor in layer.tensors.values()
        }
        for node in artifact.graph.nodes:
            self.uses.update(_weights_of((node.args, tuple(node.kwargs.values()))))

    def node(self, node: Node) -> Node:
        """The node itself, or a call of the provider's op on prepared weights."""
        if node.target is None or not node.op.startswith(("qcompiler.linear_", "qcompiler.grouped_linear_")):
            return node
        call = bind(node)
        x = call.pop("x")
        names = {part: value.name for part, value in call.items() if isinstance(value, Weight)}
        attrs = {part: value for part, value in call.items() if part not in names and value is not None}
        if any(isinstance(value, Ref) for part, value in attrs.items() if part != "offsets"):
            return node  # a weight or a setting that the graph computes: only the canonical op takes it
        if "offsets" in attrs and names:
            attrs["experts"] = self.experts.get(next(iter(names.values())))
        tensors = {part: self._read(name) for part, name in names.items()}
        provider = select_provider(
            node.op.split(".")[1], attrs, tensors, self.device, self.artifact.dtype, lean=self.lean
        )
        if provider.op is node.target:
            for part, name in names.items():
                self.weights[name] = tensors[part]
            return node
        prepared, attrs = provider.prepare(tensors, attrs)
        bound = {}
        for part, tensor in prepared.items():
            # A tensor that was left as it is (a bias) keeps its name, so that others share it.
            kept = tensor is tensors.get(part)
            bound[part] = Weight(names[part] if kept else f"{node.name}/{provider.name}/{part}")
            self.weights[bound[part].name] = tensor
        self.uses.subtract(names.values())
        return replace(
            node, op=str(provider.op), target=provider.op, args=provider.bind(x, bound, attrs), kwargs={}
        )

    def _read(self, name: str) -> torch.Tensor:
        held = self.weights.get(name)
        return self.artifact.read(name, self.device) if held is None else held


def _weights_of(value: Any) -> list[str]:
    if isinstance(value, Weight):
        return [value.name]
    if isinstance(value, tuple):
        return [name for v in value for name in _weights_of(v)]
    return []
