"""Exact accounting of what an artifact stores for its weights."""

from __future__ import annotations

from qcompiler.passes import QuantizedLinear
from qcompiler.plan import CompilePlan


class Sizes:
    """Stored bits over the number of weights they stand for.

    Attributes:
        weights: Parameters of the model, tied ones once.
        bytes: What the artifact stores for them.
        bits_per_weight: Over everything, embeddings included.
        bits_per_weight_linears: Over the quantized linears alone; a head tied to a table counts there.
        bits_per_weight_embeddings: Over the quantized embedding tables alone, 0 without any.
    """

    def __init__(self, plan: CompilePlan):
        numbers = {layer.weight: layer.out_features * layer.in_features for layer in plan.layers}
        stored = sum(layer.nbytes for layer in plan.layers)
        floats = {
            name: tensor.numel()
            for name, tensor in plan.quantized_graph.state_dict(keep_vars=True).items()
            if name in plan.captured.graph.state_dict(keep_vars=True) and tensor.is_floating_point()
        }
        self.weights = sum(numbers.values()) + sum(n for name, n in floats.items() if name not in numbers)
        self.bytes = stored + plan.dtype.itemsize * sum(floats.values())
        self.bits_per_weight = 8 * self.bytes / self.weights
        self.bits_per_weight_linears = _bits_per_weight(plan.linears)
        self.bits_per_weight_embeddings = _bits_per_weight(plan.embeddings)

    @staticmethod
    def layer_bits(layer: QuantizedLinear) -> float:
        """Bits per weight of one linear."""
        return layer.bits_per_weight


def _bits_per_weight(layers: list[QuantizedLinear]) -> float:
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    return 8 * sum(layer.nbytes for layer in layers) / weights if weights else 0.0
