"""Ternary rounding by a row's mean magnitude (Li et al. 2016, "Ternary Weight Networks", eq. 5 and 6)."""

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.methods.base import Method
from qcompiler_ternary.format import TERNARY, TernarySpec


class Ternary(Method):
    """Weights −a, 0 and a: zero below 0.7 of the row's mean magnitude, a the mean of the rest."""

    name = "ternary"
    summary = "three values per row"
    format_name = "ternary"
    bits = (2,)

    def resolve_spec(self, bits, group_size=None, options=None):
        """The format's settings."""
        self.check_bits(bits)
        if group_size is not None:
            raise InvalidInputError("method 'ternary' has no groups")
        return TernarySpec()

    def quantize(self, weight, spec, options=None, *, name="weight"):
        """Quantize a weight [out_features, in_features]."""
        magnitude = weight.float().abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise InvalidInputError(f"{name}: holds NaN or Inf")
        kept = magnitude > 0.7 * magnitude.mean(dim=1, keepdim=True)
        scales = (magnitude * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
        return TERNARY.pack((weight.sign() * kept).to(torch.int8), scales)
