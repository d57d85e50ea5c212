"""The ternary format: w[n, k] = code[n, k] · scale[n], codes −1, 0, 1 in two bits, one scale per row."""

from dataclasses import dataclass

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import TensorSpec
from qcompiler_ternary.op import LINEAR_TERNARY, unpack


@dataclass(frozen=True)
class TernarySpec:
    """The format has no settings."""

    name = "ternary"
    bits = 2

    def to_json(self):
        """What stands in the manifest."""
        return {"format": self.name}


class TernaryFormat:
    """See `qcompiler.kernels.formats.plugins.PluginFormat`."""

    name = "ternary"
    version = 1
    ops = ("linear_ternary",)
    parts = ("packed", "scales")

    def spec_from_json(self, data):
        """Read the manifest's entry."""
        if dict(data) != {"format": self.name}:
            raise InvalidInputError(f"Not the settings of a ternary format: {dict(data)!r}.")
        return TernarySpec()

    def tensor_specs(self, spec, out_features, in_features):
        """Stored tensors of a weight [out_features, in_features]."""
        packed = TensorSpec((out_features, -(-in_features // 4)), torch.uint8)
        return {"packed": packed, "scales": TensorSpec((out_features,), torch.float32)}

    def pack(self, codes, scales):
        """Store codes int8 [N, K] and scales [N]."""
        padded = torch.nn.functional.pad(codes + 1, (0, -codes.shape[1] % 4)).to(torch.uint8)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)
        packed = (padded.unflatten(1, (-1, 4)) << shifts).sum(-1, dtype=torch.uint8)
        return {"packed": packed, "scales": scales.float().contiguous()}

    def dequantize(self, spec, tensors, in_features, dtype):
        """The weight that the tensors stand for."""
        return (unpack(tensors["packed"], in_features) * tensors["scales"][:, None]).to(dtype)

    def concat(self, spec, parts):
        """Weights side by side along out_features."""
        return {name: torch.cat([part[name] for part in parts]) for name in self.parts}

    def nbytes(self, spec, out_features, in_features):
        """Stored bytes of one weight."""
        return sum(tensor.nbytes for tensor in self.tensor_specs(spec, out_features, in_features).values())

    def bits_per_weight(self, spec, out_features, in_features):
        """Stored bits of one weight over its numbers."""
        return 8 * self.nbytes(spec, out_features, in_features) / (out_features * in_features)

    def op_call(self, spec, x, tensors, bias, in_features):
        """The op and its arguments for `linear(x, weight, bias)`."""
        return LINEAR_TERNARY.overload, (x, tensors["packed"], tensors["scales"], bias, in_features)

    def read_call(self, op, call, parts):
        """Spec and in_features of a call, from which the runtime checks the stored tensors."""
        if type(call["in_features"]) is not int:
            raise InvalidInputError(f"in_features is {call['in_features']!r}, not a number")
        return TernarySpec(), call["in_features"]


TERNARY = TernaryFormat()
