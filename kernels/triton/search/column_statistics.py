"""Sizes of a weight's columns and its range, in one read of it.

With c_j = factor · Σ_i |w_ij| and C the root mean square of all c_j, a column counts as r_j = c_j/C, held
within [1/limit, limit]; by 1/(r_j·C) and 1/r_j² a search weights the errors of a group. Partial sums are
added in a fixed order, so that the result is the same each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qcompiler.kernels.triton.launch import cdiv, next_power_of_2, on_device

_TILE_ROWS = 16
_TILE_COLUMNS = 256
_PROGRAMS = 1056  # eight for each of an H100's multiprocessors
_FINAL_COLUMNS = 1024


@triton.jit
def column_sums_kernel(weight, sums, bounds, N, K, rows_per_split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (cdiv(K, COLUMNS), splits): Σ|w| by column of a split; its least and greatest weight."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    low = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    high = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < last) & (column < K)
        w = tl.load(weight + row.to(tl.int64) * K + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.abs(w)
        low = tl.minimum(low, tl.where(inside, w, float("inf")))
        high = tl.maximum(high, tl.where(inside, w, float("-inf")))
    at = tl.program_id(1) * K + column
    tl.store(sums + at, tl.sum(total, 0)[None, :], mask=column < K)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(bounds + 2 * program, tl.min(tl.min(low, 1), 0))
    tl.store(bounds + 2 * program + 1, tl.max(tl.max(high, 1), 0))


@triton.jit
def column_sizes_kernel(
    sums,
    bounds,
    inverse,
    inverse_square,
    summary,
    K,
    splits,
    programs,
    factor,
    limit,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: the two vectors [K], and summary [3]: least weight, greatest weight, Σ c²."""
    split = tl.arange(0, SPLITS)[:, None]
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        part = tl.zeros([SPLITS, COLUMNS], tl.float32)
        for first in range(0, splits, SPLITS):
            inside = (first + split < splits) & (column[None, :] < K)
            part += tl.load(sums + (first + split) * K + column[None, :], mask=inside, other=0.0)
        size = tl.sum(part, 0) * factor
        squares += size * size
        tl.store(inverse + column, size, mask=column < K)
    total = tl.sum(squares, 0)
    average = tl.maximum(tl.sqrt(total / K), 1.1754943508222875e-38)
    tl.debug_barrier()
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        size = tl.load(inverse + column, mask=column < K, other=1.0)
        relative = tl.minimum(tl.maximum(size / average, 1.0 / limit), limit)
        tl.store(inverse + column, 1.0 / (relative * average), mask=column < K)
        tl.store(inverse_square + column, 1.0 / (relative * relative), mask=column < K)
    program = tl.arange(0, PROGRAMS)
    lows = tl.load(bounds + 2 * program, mask=program < programs, other=float("inf"))
    highs = tl.load(bounds + 2 * program + 1, mask=program < programs, other=float("-inf"))
    tl.store(summary, tl.min(lows, 0))
    tl.store(summary + 1, tl.max(highs, 0))
    tl.store(summary + 2, total)


class ColumnStatistics(NamedTuple):
    """What `column_statistics` finds.

    Attributes:
        inverse: 1/(r·C), fp32 [K].
        inverse_square: 1/r², fp32 [K].
        summary: Least weight, greatest weight and Σ c², fp32 [3]; the last is not finite if a weight is not.
    """

    inverse: torch.Tensor
    inverse_square: torch.Tensor
    summary: torch.Tensor


def column_statistics(weight: torch.Tensor, factor: float, limit: float) -> ColumnStatistics:
    """Sizes of the columns of a weight [N, K], contiguous; see the top of the file."""
    rows, columns = weight.shape
    across = cdiv(columns, _TILE_COLUMNS)
    wanted = max(1, min(_PROGRAMS // across, cdiv(rows, 4 * _TILE_ROWS)))
    each = cdiv(cdiv(rows, wanted), _TILE_ROWS) * _TILE_ROWS
    splits = cdiv(rows, each)
    scratch = weight.new_empty(splits * (columns + 2 * across), dtype=torch.float32)
    sums, bounds = scratch.split((splits * columns, splits * across * 2))
    inverse, inverse_square = weight.new_empty((2, columns), dtype=torch.float32)
    summary = weight.new_empty(3, dtype=torch.float32)
    with on_device(weight):
        column_sums_kernel[(across, splits)](
            weight, sums, bounds, rows, columns, each, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS, num_warps=4
        )
        column_sizes_kernel[(1,)](
            sums, bounds, inverse, inverse_square, summary, columns, splits, splits * across, factor, limit,
            SPLITS=16, PROGRAMS=next_power_of_2(splits * across), COLUMNS=_FINAL_COLUMNS, num_warps=16,
        )  # fmt: skip
    return ColumnStatistics(inverse, inverse_square, summary)
