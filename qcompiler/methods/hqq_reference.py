"""The published HQQ solver, step for step, so that its codes, scales and zeros can be had exactly.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), as the hqq
package runs it on a CPU in fp32 along the input features. With t = (2^bits - 1)/(max - min) the
inverse scale of a group and z its zero point:

    codes  q = clamp(round(w·t + z))          reconstruction  r = (q - z)/t
    error  e = shrink(w - r)                  shrink(x) = sign(x)·max(|x| - |x|^(p-1)/β, 0)
    zero   z = mean(q - (w - e)·t)

for at most 20 rounds, until the mean |w - r| of the whole tensor stops falling. Only z moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 20
P = 0.7
BETA = 10.0
_SMALLEST_RANGE = 1e-4
_LARGEST_INVERSE_SCALE = 2e4
# shrink(x) is 0 wherever |x|^(2-p) ≤ 1/β; a little below that the powers need not be taken.
_NO_SHRINK_BELOW = 0.99 * (1 / BETA) ** (1 / (2 - P))


def solve(parts: Sequence[Tensor], bits: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Quantize a tensor given as matrices of groups.

    The whole tensor is worked on at once, since the rule that stops the rounds looks at all of it: about
    six fp32 arrays of its size are held.

    Args:
        parts: fp32 [groups, size] each; more than one where the last group of a row is short.
        bits: Bits per code; at 4 bits the first zero point is rounded, as the package does.

    Returns:
        For each part: codes as fp32 [groups, size], scales and zeros fp32 [groups, 1], not yet rounded
        to what is stored.
    """
    top = round(2**bits - 1)
    inverse_scales = [_inverse_scales(part, top) for part in parts]
    zeros = [-part.amin(dim=1, keepdim=True) * t for part, t in zip(parts, inverse_scales, strict=True)]
    if bits == 4:
        zeros = [torch.round(z) for z in zeros]
    best = float("inf")
    for _ in range(ROUNDS):
        steps = [_round(w, t, z, top) for w, t, z in zip(parts, inverse_scales, zeros, strict=True)]
        zeros = [zero for zero, _ in steps]
        error = _mean([e for _, e in steps], parts)
        if not error < best:  # the zeros of the round that was no better are kept, as published
            break
        best = error
    return [
        (torch.round(w * t + z).clamp_(0, top), 1.0 / t, z)
        for w, t, z in zip(parts, inverse_scales, zeros, strict=True)
    ]


def _inverse_scales(groups: Tensor, top: int) -> Tensor:
    spread = groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True)
    inverse = torch.where(spread.abs() <= _SMALLEST_RANGE, 1.0, top / spread)
    return inverse.clamp(max=_LARGEST_INVERSE_SCALE)


def _round(w: Tensor, t: Tensor, z: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """New zeros and the mean |error| before the move, as a 0-d tensor."""
    q = torch.round(w * t + z).clamp_(0, top)
    error = w - (q - z) / t
    size = error.abs()
    mean = size.mean()
    target = w
    if float(size.max()) > _NO_SHRINK_BELOW:
        target = w - torch.sign(error) * (size - (1.0 / BETA) * size.pow(P - 1)).clamp_min_(0.0)
    return torch.mean(q - target * t, dim=1, keepdim=True), mean


def _mean(means: Sequence[Tensor], parts: Sequence[Tensor]) -> float:
    if len(means) == 1:
        return float(means[0])
    total = sum(part.numel() for part in parts)
    return sum(float(mean) * part.numel() for mean, part in zip(means, parts, strict=True)) / total
