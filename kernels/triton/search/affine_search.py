"""Affine groups quantized in one pass: every round of a group's search happens in registers.

The numbers are those of the solver in torch (`qcompiler.methods.hqq`): per group

    least Σ_j u_j (w_j - (q_j - z)·s)²,    u_j = inverse_square_j · sqrt(1 + (w_j·inverse_j)²)

by alternating rounding with the least-squares line from several clips of the range, then the best of
the stored lines; with SEARCH off, plain rounding. W is read twice (the second time for the codes of the
stored line, from the cache), codes, scales and zeros are written once.

A tile is [L, R, C, E]: R rows of one group column, the group's values cut into C·L runs of E, an
aligned 16-byte load each. This order of dimensions makes Triton spread L and R over the lanes and keep
C and E in a thread's registers, so that a sum over a group needs log2(L) shuffles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.affine_search import Search
from qcompiler.kernels.formats.affine import AffineSpec, num_groups
from qcompiler.kernels.triton.launch import cdiv, on_device

_THREADS = 128
_MAGIC = tl.constexpr(12582912.0)  # 1.5·2^23: adding and subtracting it rounds to the nearest even integer
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _sum(x):
    """Over the values of each group: [L, R, C, E] → [1, R, 1, 1]."""
    inner = tl.sum(tl.sum(x, 3, keep_dims=True), 2, keep_dims=True)
    return tl.sum(inner, 0, keep_dims=True)


@triton.jit
def _codes(values, slope, offset, TOP: tl.constexpr, COMPILED: tl.constexpr):
    """round(clamp(values·slope + offset, 0, TOP)), with slope and offset in units of TOP."""
    if COMPILED:
        part = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [values, slope, offset],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        part = tl.minimum(tl.maximum(values * slope + offset, 0.0), 1.0)
    return (part * TOP + _MAGIC) - _MAGIC


@triton.jit
def _line(values, u, inverse_scale, zero, TOP: tl.constexpr, COMPILED: tl.constexpr):
    """(covariance, variance, mean) of the codes nearest to a line."""
    codes = _codes(values, inverse_scale * (1.0 / TOP), zero * (1.0 / TOP), TOP, COMPILED)
    weighted = codes * u
    mean = _sum(weighted)
    square = _sum(weighted * codes)
    covariance = _sum(weighted * values)
    return covariance, tl.maximum(square - mean * mean, 1e-6), mean


@triton.jit
def _store(
    scale, offset, largest, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, LIMIT: tl.constexpr, SCALE, ZERO
):
    """Scale and zero as stored, in fp32, for lines w = offset + scale · code."""
    scale = tl.minimum(tl.maximum(tl.maximum(scale, largest * (1.0 / 1024)), SMALLEST), LARGEST)
    scale = scale.to(SCALE).to(tl.float32)
    zero = tl.minimum(tl.maximum(tl.div_rn(-offset, scale), -LIMIT), LIMIT).to(ZERO).to(tl.float32)
    return scale, zero + 0.0  # no negative zero


@triton.jit
def _error(values, u, scale, zero, mean, spread, TOP: tl.constexpr, COMPILED: tl.constexpr):
    """Σ u·(w - (q - zero)·scale)² in units of spread², over values (w - mean)/spread."""
    zero = zero + mean / scale
    codes = _codes(values, spread / scale * (1.0 / TOP), zero * (1.0 / TOP), TOP, COMPILED)
    error = (codes - zero) * (scale / spread) - values
    return _sum(error * error * u)


@triton.jit
def affine_search_kernel(
    weight,
    inverse,
    inverse_square,
    codes,
    scales,
    zeros,
    N,
    K,
    clip_low,
    clip_step,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    CLIPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    LAST_ROUNDS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    E: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (groups of a row, cdiv(N, R)): codes uint8 [N, K], scales and zeros [groups, N]."""
    TOP: tl.constexpr = 2.0**BITS - 1
    SCALE: tl.constexpr = scales.dtype.element_ty
    ZERO: tl.constexpr = zeros.dtype.element_ty
    group = tl.program_id(0)
    row = tl.program_id(1) * R + tl.arange(0, R)
    k = (
        tl.arange(0, C)[None, None, :, None] * (L * E)
        + tl.arange(0, L)[:, None, None, None] * E
        + tl.arange(0, E)[None, None, None, :]
    )
    column = group * SIZE + k
    read = tl.minimum(row, N - 1).to(tl.int64)[None, :, None, None] * K + column
    if EVEN:
        w = tl.load(weight + read).to(tl.float32)
        low = w
        high = w
    else:
        inside = column < K
        w = tl.load(weight + read, mask=inside, other=0.0).to(tl.float32)
        low = tl.where(inside, w, float("inf"))
        high = tl.where(inside, w, float("-inf"))
    low = tl.min(tl.min(tl.min(low, 3, keep_dims=True), 2, keep_dims=True), 0, keep_dims=True)
    high = tl.max(tl.max(tl.max(high, 3, keep_dims=True), 2, keep_dims=True), 0, keep_dims=True)
    largest = tl.maximum(-low, high)
    best_scale, best_zero = _store((high - low) / TOP, low, largest, SMALLEST, LARGEST, LIMIT, SCALE, ZERO)
    if SEARCH:
        # Every row loads its own copy: a tile without rows would bring in a layout of its own.
        every = tl.broadcast_to(column, [L, R, C, E])
        if EVEN:
            to_unit = tl.load(inverse + every)
            relative = tl.load(inverse_square + every)
        else:
            to_unit = tl.load(inverse + every, mask=inside, other=0.0)
            relative = tl.load(inverse_square + every, mask=inside, other=0.0)
        in_column = w * to_unit
        u = tl.sqrt(in_column * in_column + 1.0) * relative
        u = u * (1.0 / _sum(u))
        spread = tl.maximum(high - low, _TINY)
        mean = _sum(w * u)
        v = (w - mean) / spread
        if not EVEN:
            v = tl.where(inside, v, 0.0)
        below = (low - mean) / spread
        above = (high - mean) / spread
        gain = below * 0.0 - 1.0
        slope = below * 0.0 + 1.0
        code = below * 0.0
        for i in range(CLIPS * CLIPS):
            start = (clip_low + clip_step * (i // CLIPS)) * below
            inverse_scale = TOP / tl.maximum((clip_low + clip_step * (i % CLIPS)) * above - start, 1e-6)
            zero = -start * inverse_scale
            for _ in tl.static_range(ROUNDS):
                covariance, variance, average = _line(v, u, inverse_scale, zero, TOP, COMPILED)
                scale = covariance / variance
                better = covariance * scale > gain
                gain = tl.where(better, covariance * scale, gain)
                slope = tl.where(better, scale, slope)
                code = tl.where(better, average, code)
                inverse_scale = 1.0 / tl.maximum(scale, 1e-12)
                zero = average
        inverse_scale = 1.0 / tl.maximum(slope, 1e-12)
        zero = code
        for _ in range(LAST_ROUNDS):
            covariance, variance, average = _line(v, u, inverse_scale, zero, TOP, COMPILED)
            scale = covariance / variance
            better = covariance * scale > gain
            gain = tl.where(better, covariance * scale, gain)
            slope = tl.where(better, scale, slope)
            code = tl.where(better, average, code)
            inverse_scale = 1.0 / tl.maximum(scale, 1e-12)
            zero = average

        error = _error(v, u, best_scale, best_zero, mean, spread, TOP, COMPILED)
        scale = slope * spread
        offset = mean - code * scale
        for _ in range(2):
            # First the line found, then once more from the codes of the stored line, whose rounding may
            # have moved some.
            scale, zero = _store(scale, offset, largest, SMALLEST, LARGEST, LIMIT, SCALE, ZERO)
            found = _error(v, u, scale, zero, mean, spread, TOP, COMPILED)
            better = found < error
            error = tl.where(better, found, error)
            best_scale = tl.where(better, scale, best_scale)
            best_zero = tl.where(better, zero, best_zero)
            covariance, variance, average = _line(
                v, u, spread / best_scale, best_zero + mean / best_scale, TOP, COMPILED
            )
            scale = covariance / variance * spread
            offset = mean - average * scale

    # A group of one value c is code 0 with scale 2^k and zero -c/2^k: c keeps all bits of a zero point.
    exponent = ((low.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    exponent = tl.where(low == 0, -1, tl.minimum(tl.maximum(exponent, -14), 15))
    power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    only_scale, only_zero = _store(power, low, low * 0.0, SMALLEST, LARGEST, LIMIT, SCALE, ZERO)
    constant = low == high
    best_scale = tl.where(constant, only_scale, best_scale)
    best_zero = tl.where(constant, only_zero, best_zero)

    real = (row < N)[None, :, None, None]
    written = real
    if EVEN:
        w = tl.load(weight + read).to(tl.float32)
    else:
        w = tl.load(weight + read, mask=inside, other=0.0).to(tl.float32)
        written = real & inside
    reciprocal = 1.0 / best_scale
    quotient = w * reciprocal
    quotient = tl.fma(
        tl.fma(-quotient, best_scale, w), reciprocal, quotient
    )  # w / best_scale to the last bit
    q = (tl.minimum(tl.maximum(quotient + best_zero, 0.0), TOP) + _MAGIC) - _MAGIC
    q = tl.where(constant, 0.0, q)
    tl.store(codes + read, q.to(tl.uint8), mask=written)
    at = group.to(tl.int64) * N + row[None, :, None, None]
    tl.store(scales + at, best_scale.to(SCALE), mask=real)
    tl.store(zeros + at, best_zero.to(ZERO), mask=real)


COMPILED = not isinstance(affine_search_kernel, InterpretedFunction)


class Tile(NamedTuple):
    """Shape of a program's tile, see the top of the file."""

    lanes: int
    rows: int
    chunks: int
    run: int
    warps: int


def affine_search(
    weight: torch.Tensor,
    spec: AffineSpec,
    search: Search | None = None,
    columns: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize every group of a weight.

    Args:
        weight: [N, K], floating point, finite and within the range of the scale dtype; contiguous.
        spec: Bits, group size (not 0) and scale dtype.
        search: What to try for each group; None rounds between the group's smallest and largest value.
        columns: `inverse` and `inverse_square` fp32 [K] of the importances; with `search`.
        tile: How the work is cut, if not as `tile_of` says.

    Returns:
        Codes uint8 [N, K]; scales and zeros [groups, N] in the spec's dtypes.
    """
    rows, in_features = weight.shape
    groups = num_groups(spec.group_size, in_features)
    codes = torch.empty((rows, in_features), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((groups, rows), dtype=spec.scale_dtype, device=weight.device)
    zeros = torch.empty((groups, rows), dtype=spec.zero_dtype, device=weight.device)
    info = torch.finfo(spec.scale_dtype)
    subnormal = info.eps if spec.scale_dtype == torch.float16 else 1.0
    even = in_features % spec.group_size == 0
    tile = tile or tile_of(spec.group_size, weight.element_size(), even=even)
    inverse, inverse_square = columns if columns is not None else (scales, scales)  # not read
    grid = (groups, cdiv(rows, tile.rows))
    with on_device(weight):
        affine_search_kernel[grid](
            weight, inverse, inverse_square, codes, scales, zeros, rows, in_features,
            search.low if search else 0.0,
            (search.high - search.low) / max(1, search.clips - 1) if search else 0.0,
            BITS=spec.bits, SIZE=spec.group_size, SEARCH=search is not None,
            CLIPS=search.clips if search else 0, ROUNDS=search.rounds if search else 0,
            LAST_ROUNDS=search.last_rounds if search else 0,
            SMALLEST=info.smallest_normal * subnormal, LARGEST=info.max,
            LIMIT=torch.finfo(spec.zero_dtype).max, EVEN=even,
            L=tile.lanes, R=tile.rows, C=tile.chunks, E=tile.run, COMPILED=COMPILED, num_warps=tile.warps,
        )  # fmt: skip
    return codes, scales, zeros


def tile_of(group_size: int, itemsize: int, *, even: bool = True) -> Tile:
    """The most values in a thread that its registers hold with all else: fewer cost shuffles."""
    run = min(16 // itemsize, group_size)
    values = 64 if even and group_size <= 64 else 32
    lanes = max(1, group_size // values)
    return Tile(lanes, _THREADS // lanes, group_size // (lanes * run), run, _THREADS // 32)
