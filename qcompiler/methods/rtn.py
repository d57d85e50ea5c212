"""Round to nearest: the range of a group is cut evenly and each weight goes to the nearest point.

scale = (max - min) / (2^bits - 1), zero = -min / scale, code = round(w / scale + zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.methods import fused_affine
from qcompiler.methods.affine import AffineMethod, Groups, check_weight, store


class RoundToNearest(AffineMethod):
    """Asymmetric round to nearest with a real-valued zero point."""

    name = "rtn"
    summary = "round to nearest between each group's minimum and maximum"

    def solve_groups(self, values: Tensor, spec: AffineSpec, importance: Tensor | None) -> Groups:
        """See `AffineMethod.solve_groups`."""
        top = float(2**spec.bits - 1)
        low, high = values.aminmax(dim=1, keepdim=True)
        scales, zeros = store((high - low) / top, low, torch.maximum(-low, high), spec)
        codes = torch.round(values / scales + zeros).clamp_(0.0, top)
        return Groups(codes, scales, zeros)

    def fused(
        self, weight: Tensor, spec: AffineSpec, options: Mapping[str, Any], name: str
    ) -> dict[str, Tensor]:
        """See `AffineMethod.fused`."""
        check_weight(weight, spec, name)
        return fused_affine.quantize(weight, spec)
