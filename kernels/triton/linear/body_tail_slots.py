"""The tail of the body_tail format inside Triton kernels, and what the launches around them need.

Slot t of neighbouring rows is contiguous, so a program reads the tail of its rows a few slots at a time
and gathers the x that they name. A sum over slots does not care which slice of K the body of a split-K
program is in, so the programs share the slots evenly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tail_slots(tail, t, row, last, N, K, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, TAIL_BITS: tl.constexpr):
    """Columns, factors of the row's tail scale, and which slots t < last of rows are in use."""
    LEVELS: tl.constexpr = (1 << (TAIL_BITS - 1)) - 1
    STEP: tl.constexpr = 8.0 / (1 << (TAIL_BITS - 1))
    word = tl.load(tail + t.to(tl.int64) * N + row, mask=t < last, other=0).to(tl.int32)
    k = t // SLOTS * COLUMNS + (word & ((1 << (16 - TAIL_BITS)) - 1))
    m = (word >> (16 - TAIL_BITS)) & LEVELS
    factor = tl.exp2((m - LEVELS).to(tl.float32) * STEP)
    return k, tl.where(word < 0, -factor, factor), (m > 0) & (k < K)


@triton.jit
def add_tail_kernel(
    weight,
    tail,
    tail_scales,
    N,
    K,
    slots,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL_BITS: tl.constexpr,
    BN: tl.constexpr,
    TS: tl.constexpr,
):
    """Grid (cdiv(N, BN), cdiv(slots, TS)): weight [N, K] += tail; no two slots of a row name one column."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)[None, :]
    t = (tl.program_id(1) * TS + tl.arange(0, TS))[:, None]
    k, factor, used = tail_slots(tail, t, row, slots, N, K, SLOTS, COLUMNS, TAIL_BITS)
    used = used & (rn < N)[None, :]
    at = weight + row.to(tl.int64) * K + k
    body = tl.load(at, mask=used, other=0.0).to(tl.float32)
    value = body + factor * tl.load(tail_scales + row).to(tl.float32)
    tl.store(at, value.to(weight.dtype.element_ty), mask=used)


@triton.jit
def prepare_x_kernel(x, xt, sums, M, K, x_stride, xt_stride, size, BM: tl.constexpr, BK: tl.constexpr):
    """Grid (groups, xt_stride / BM): xt [K, xt_stride] = xᵀ and zeros, sums float32 [groups, xt_stride].

    x [M, K] rows x_stride apart; a group is `size` columns, sums[g, m] the sum of x[m] over its columns.
    """
    group = tl.program_id(0)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    end = tl.minimum((group + 1) * size, K)
    total = tl.zeros((BM,), dtype=tl.float32)
    for start in range(group * size, end, BK):
        k = start + tl.arange(0, BK)
        inside = k < end
        mask = (rm < M)[:, None] & inside[None, :]
        tile = tl.load(x + rm.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        tl.store(xt + k.to(tl.int64)[:, None] * xt_stride + rm[None, :], tl.trans(tile), mask=inside[:, None])
        total += tl.sum(tile.to(tl.float32), axis=1)
    tl.store(sums + group * xt_stride + rm, total)
