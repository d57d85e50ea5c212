"""Activations by pairs of neighbours inside Triton kernels: one 4-byte load brings two 16-bit values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def as_pairs(x: torch.Tensor) -> torch.Tensor | None:
    """View x [tokens, in_features] as int32 pairs, or None where dtype, evenness or alignment forbid it."""
    fits = x.element_size() == 2 and x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0
    return x.view(torch.int32) if fits and x.stride(1) == 1 else None


@triton.jit
def pair_row(x, token, x_stride, PAIRS: tl.constexpr):
    """Where a row of x [tokens, in_features], rows x_stride values apart, begins."""
    if PAIRS:
        return x + token.to(tl.int64) * (x_stride // 2)
    else:
        return x + token.to(tl.int64) * x_stride


@triton.jit
def pair_floats(pair, HALF: tl.constexpr):
    """The lower and upper half of int32s, values of dtype HALF, as float32."""
    if tl.bfloat16 == HALF:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        lower = (pair & 0xFFFF).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
        return lower, (pair >> 16).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)


@triton.jit
def load_pair(row, pair, mask, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """Values 2·pair and 2·pair + 1 of the row as float32, zero outside of the mask.

    PAIRS: the row holds int32 of two values of dtype HALF each. mask: None, or of the shape of `pair`.
    """
    if PAIRS:
        if mask is None:
            both = tl.load(row + pair)
        else:
            both = tl.load(row + pair, mask=mask, other=0)
        return pair_floats(both, HALF)
    elif mask is None:
        return tl.load(row + 2 * pair).to(tl.float32), tl.load(row + 2 * pair + 1).to(tl.float32)
    else:
        even = tl.load(row + 2 * pair, mask=mask, other=0.0).to(tl.float32)
        return even, tl.load(row + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
