"""What a linear may become, and which linears must become the same: the choices of an allocation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.layer_plan import matches
from qcompiler.methods.base import get_method
from qcompiler.options import CompileOptions
from qcompiler.passes import QuantizedLinear
from qcompiler.passes.quantize_linears import linear_like, linear_name
from qcompiler.plan import CompilePlan, output_heads

# bits -> group sizes. Finer groups than these cost as much as the next width, and gain less.
_AFFINE = {2: (32, 64, 128), 3: (64, 128, 256), 4: (64, 128, 256), 5: (128, 256), 6: (128, 256), 8: (128,)}
# What `--method auto` mixes: (method, bits); affine methods in the groups above.
_CALIBRATED_POOL = (*(("gptq", bits) for bits in _AFFINE), ("bnb", 4), ("eetq", 8), ("aqlm", 2))
_DATA_FREE_POOL = (*(("hqq", bits) for bits in _AFFINE), ("bnb", 4), ("eetq", 8))


@dataclass(frozen=True)
class Candidate:
    """One way to store a linear.

    Attributes:
        method: Name of the method.
        spec: The format's settings.
        options: The method's own options, as sorted pairs.
    """

    method: str
    spec: Any
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Short and unique within a pool, e.g. "gptq 3 g64"."""
        scheme = getattr(self.spec, "scheme", None) or getattr(self.spec, "quant_type", None)
        group = getattr(self.spec, "group_size", getattr(self.spec, "block_size", 0))
        name = f"{self.method} {scheme or self.spec.bits}"
        return f"{name} g{group}" if group else name

    def nbytes(self, layer: QuantizedLinear) -> int:
        """What is stored for a layer in this way."""
        return get_format(self.spec.name).nbytes(self.spec, layer.out_features, layer.in_features)

    def takes(self, layer: QuantizedLinear) -> bool:
        """Whether the format has room for the layer's shape and an op for its kind."""
        format_ = get_format(self.spec.name)
        try:
            format_.tensor_specs(self.spec, layer.out_features, layer.in_features)
        except InvalidInputError:
            return False
        return layer.kind == "linear" or hasattr(format_, "grouped_op_call")


@dataclass(frozen=True)
class Group:
    """Layers that get one format, since they read the same input and are laid side by side.

    Attributes:
        name: Of the first of them.
        layers: In graph order.
    """

    name: str
    layers: tuple[QuantizedLinear, ...]

    def nbytes(self, candidate: Candidate) -> int:
        """What is stored for all of them."""
        return sum(candidate.nbytes(layer) for layer in self.layers)


def pool(options: CompileOptions, *, calibrated: bool) -> list[Candidate]:
    """The candidates that the options leave, in the order of their size.

    Args:
        options: `method` is "auto" or one method, whose widths and groups then vary alone; a `group_size`
            leaves this one only.
        calibrated: Calibration text is at hand.

    Raises:
        InvalidInputError: The method has no such choices.
    """
    if options.method == "auto":
        pairs: Sequence[tuple[str, int]] = _CALIBRATED_POOL if calibrated else _DATA_FREE_POOL
        given: dict[str, Any] = {}
    else:
        method = get_method(options.method)
        pairs = [(options.method, bits) for bits in method.bits]
        given = method.validate(options.method_options)
    found: dict[Any, Candidate] = {}
    for name, bits in pairs:
        method = get_method(name)
        affine = method.format_name == "affine"
        sizes: Sequence[int | None] = _AFFINE.get(bits, (64,)) if affine else (None,)
        if options.group_size is not None and affine:
            sizes = (options.group_size,)
        for size in sizes:
            chosen = given or method.validate({})
            spec = method.resolve_spec(bits, size, chosen)
            found.setdefault(spec, Candidate(name, spec, tuple(sorted(chosen.items()))))
    if len(found) < 2:
        raise InvalidInputError(
            f"method {options.method!r} has one way to store a weight only: there is nothing to choose from",
            hint="Use --method auto with a target, or drop the target.",
        )
    return sorted(found.values(), key=lambda item: (_size(item), item.label))


def groups_of(plan: CompilePlan) -> list[Group]:
    """The layers whose format is open, in groups that must share one; what the user fixed is left out."""
    fixed = {layer.name for layer in plan.embeddings} | output_heads(plan.captured.graph)
    fixed |= {
        layer.name
        for layer in plan.layers
        if any(matches(pattern, layer.name) for pattern, _ in plan.options.bits_overrides)
    }
    inputs = _inputs(plan.captured.graph)
    groups: dict[Any, list[QuantizedLinear]] = {}
    for layer in plan.layers:
        if layer.name not in fixed:
            groups.setdefault(inputs.get(layer.name, layer.name), []).append(layer)
    return [Group(layers[0].name, tuple(layers)) for layers in groups.values()]


def _inputs(gm: GraphModule) -> dict[str, str]:
    """Linear → the value that it reads."""
    return {
        linear_name(node): str(node.args[0])
        for node in gm.graph.nodes
        if linear_like(node) and node.args[1].op == "get_attr"
    }


def _size(candidate: Candidate) -> float:
    return get_format(candidate.spec.name).bits_per_weight(candidate.spec, 4096, 4096)
