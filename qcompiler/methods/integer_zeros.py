"""Affine groups whose zero point is itself a code: w = (q - z)·s with z an integer in [0, 2^bits - 1].

What runtimes with packed zero points take (MatMulNBits of onnxruntime). Zero is always one of the
values, so a group's range is widened to hold it. For given codes and z the best scale has the closed form

    s = Σ u (q - z) w / Σ u (q - z)²        which leaves Σ u w² - (Σ u (q - z) w)² / Σ u (q - z)²

Rounding to codes and refitting s alternate from several clips of the range at both ends, each with the
zero point that it rounds to; the result is kept only where it beats plain rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.methods.base import MethodOption

OPTION = MethodOption(
    "float",
    ("float", "integer"),
    "zero points: of any value, or integers in the range of the codes, as ONNX stores them",
)
_ROUNDS = 3


def integer_groups(
    values: Tensor, spec: AffineSpec, importance: Tensor | None, clips: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and integer zeros of groups.

    Args:
        values: fp32 [groups, size], finite.
        spec: Bits and scale dtype.
        importance: Positive fp32 [groups, size], or None: all alike.
        clips: Shares of the range to start from at either end; none: round to nearest.

    Returns:
        Codes fp32 [groups, size]; scales (positive, as stored) and zeros fp32 [groups, 1].
    """
    top = float(2**spec.bits - 1)
    weights = torch.ones_like(values) if importance is None else importance
    low, high = values.aminmax(dim=1, keepdim=True)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    best = _Best(values, weights, spec, top)
    scale = ((high - low) / top).clamp_min(torch.finfo(torch.float32).tiny)
    best.offer(scale, (-low / scale).round_().clamp_(0.0, top))
    gain = torch.zeros_like(scale)
    found, found_zero = scale, best.zeros
    for clip_low in clips:
        for clip_high in clips:
            step = ((clip_high * high - clip_low * low) / top).clamp_min(torch.finfo(torch.float32).tiny)
            zero = (-clip_low * low / step).round_().clamp_(0.0, top)
            for _ in range(_ROUNDS):
                step, won = _refit(values, weights, step, zero, top)
                better = won > gain
                gain = torch.where(better, won, gain)
                found, found_zero = torch.where(better, step, found), torch.where(better, zero, found_zero)
    if clips:
        best.offer(found, found_zero)
        # Once more from the codes of the stored scale, whose rounding may have moved some.
        best.offer(_refit(values, weights, best.scales, best.zeros, top)[0], best.zeros)
    return _constants_exact(values, best, spec)


def _refit(values: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """The best scale for the codes nearest to a line, and what its line takes off the squared error."""
    steps = torch.round(values / scale + zero).clamp_(0.0, top).sub_(zero)
    weighted = steps * weights
    along = (weighted * values).sum(dim=1, keepdim=True)
    square = weighted.mul_(steps).sum(dim=1, keepdim=True)
    usable = (along > 0) & (square > 0)
    square = torch.where(usable, square, 1.0)
    return torch.where(usable, along / square, scale), torch.where(usable, along * along / square, 0.0)


class _Best:
    """Per group, the stored scale and the zero of least weighted squared error among those offered."""

    def __init__(self, values: Tensor, weights: Tensor, spec: AffineSpec, top: float):
        self._values = values
        self._weights = weights
        self._spec = spec
        self._top = top
        self._error = torch.full_like(values[:, :1], float("inf"))
        self.scales = torch.ones_like(self._error)
        self.zeros = torch.zeros_like(self._error)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Try scales and zeros, fp32 [groups, 1]."""
        scales = stored_scales(scales, self._spec)
        error = (self.codes(scales, zeros) - zeros).mul_(scales).sub_(self._values)
        error = error.square_().mul_(self._weights).sum(dim=1, keepdim=True)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, fp32 [groups, size]."""
        return torch.round(self._values / scales + zeros).clamp_(0.0, self._top)


def stored_scales(scales: Tensor, spec: AffineSpec) -> Tensor:
    """Positive finite scales that the stored dtype holds, as fp32."""
    info = torch.finfo(spec.scale_dtype)
    smallest = info.smallest_normal if spec.scale_dtype != torch.float16 else info.smallest_normal * info.eps
    return scales.clamp(smallest, info.max).to(spec.scale_dtype).float()


def _constants_exact(values: Tensor, best: _Best, spec: AffineSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of one value c as one step of size |c| from zero, so that c keeps what the scale's dtype has."""
    low, high = values.aminmax(dim=1, keepdim=True)
    constant = (low == high) & (low != 0)
    scales = torch.where(constant, stored_scales(low.abs(), spec), best.scales)
    zeros = torch.where(constant, (low < 0).float(), best.zeros)
    codes = torch.where(constant, (low > 0).float(), best.codes(best.scales, best.zeros))
    return codes, scales, zeros
