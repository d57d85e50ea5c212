"""What the kernels over experts share: which expert's rows a program works on, and the size of its tile.

Rows are sorted by expert, `offsets` [experts] says where each expert's rows end. A program finds its
expert on the device, so the grid depends on shapes only and no count reaches the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.launch import next_power_of_2


@triton.jit
def rows_of_program(offsets, rows, block, EXPERTS: tl.constexpr, EXPERTS_P2: tl.constexpr, BM: tl.constexpr):
    """Expert, first row of the tile, and end of the expert's rows, for program `block` of the row axis.

    Expert e owns the programs from start[e] // BM + e on, always enough of them: rows // BM + EXPERTS + 1
    are launched. Rows after the last expert belong to one more, number EXPERTS, without weights, whose
    tiles write zeros. A tile whose first row is not below the end has nothing to do. Offsets are computed
    by the graph, so they are held inside the rows whatever they are.
    """
    index = tl.arange(0, EXPERTS_P2)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index <= EXPERTS), other=0)
    starts = tl.minimum(tl.maximum(starts, 0), rows)
    owned = (index <= EXPERTS) & (starts // BM + index <= block)
    expert = tl.sum(owned.to(tl.int32), 0) - 1
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    first = tl.minimum(tl.maximum(first, 0), rows)
    last = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    last = tl.where(expert < EXPERTS, tl.minimum(last, rows), rows)
    return expert, first + (block - first // BM - expert) * BM, last


@triton.jit
def store_tile(out, acc, bias, held, rn, rm, last, is_expert, N, HAS_BIAS: tl.constexpr):
    """Write yᵀ [BN, BM] plus bias [experts, N] to out [rows, N]: channels `rn`, rows `rm` below `last`."""
    if HAS_BIAS:
        added = tl.load(bias + held * N + rn, mask=(rn < N) & is_expert, other=0.0)
        acc += added.to(tl.float32)[:, None]
    at = rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < last))


def experts_power_of_2(experts: int) -> int:
    """EXPERTS_P2 of `rows_of_program`: room for the experts and the rows of none."""
    return next_power_of_2(experts + 1)


def expert_tile(rows: int, experts: int, itemsize: int) -> tuple[int, int, int, int]:
    """(BN, BM, warps, stages) of kernels that decode weights, for `rows` spread evenly over `experts`."""
    block_m = min(max(next_power_of_2(-(-rows // experts)), 16), 128)
    if itemsize == 4:
        return 32, min(block_m, 32), 4, 2
    if block_m == 128:
        return 128, 128, 8, 2
    return 64, block_m, 4, 3
