"""Additive linears for one token by tables of partial sums (as CodeGEMM, arXiv 2512.17970, does it).

A group of D inputs meets one codebook in 2^bits possible ways only. So the
products of all codewords with x are formed once, table[code, column] = Σ_d
book[code, d]·x[d] for every column of codes, and a row of the output is the
sum of one entry per column. Where the codebooks are small (8 bits) that
replaces a gather of 16 bytes per group by one of 4 from shared memory, 32
columns to a warp, so that each of its lanes has a memory bank of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def additive_tables_kernel(
    x,
    codebooks,
    tables,
    K,
    columns,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    CODES: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
):
    """Grid (tiles, CODES // BC): float32 tables [tiles, CODES, BJ]; columns past the end are zero."""
    tile = tl.program_id(0)
    code = tl.program_id(1) * BC + tl.arange(0, BC)
    j = tile * BJ + tl.arange(0, BJ)
    lane = tl.arange(0, D)
    k = (j // COUNT * D)[:, None] + lane[None, :]
    inside = (j[:, None] < columns) & (k < K)
    xs = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    entry = ((j % COUNT) * CODES)[None, :] + code[:, None]
    words = tl.load(codebooks + entry[:, :, None] * D + lane[None, None, :]).to(tl.float32)
    product = tl.sum(words * xs[None, :, :], axis=2)
    at = (tile.to(tl.int64) * CODES + code)[:, None] * BJ + tl.arange(0, BJ)[None, :]
    tl.store(tables + at, product)


@triton.jit(do_not_specialize=["zero"])
def additive_sums_kernel(
    tables,
    codes,
    scales,
    bias,
    out,
    N,
    columns,
    tiles,
    tiles_per_split,
    zero,
    CODES: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT): out [N], or float32 parts [SPLIT, N] when SPLIT > 1.

    `zero` is 0: added to the addresses of codes it hides their alignment, so that a thread loads single
    codes and a warp 32 columns of one row.
    """
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1).to(tl.int64)
    j = tl.arange(0, BJ)
    entry = tl.arange(0, CODES * BJ)
    total = tl.zeros((BN, BJ), dtype=tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tiles)
    for tile in range(split * tiles_per_split, last):
        column = tile * BJ + j + zero
        at = row[:, None] * columns + column[None, :]
        code = tl.load(codes + at, mask=column[None, :] < columns, other=0).to(tl.int32)
        table = tl.load(tables + tile * (CODES * BJ) + entry)
        # Flat, because along an axis that fits a warp the compiler would shuffle instead.
        found = tl.gather(table, tl.reshape(code * BJ + j[None, :], (BN * BJ,)), axis=0)
        total += tl.reshape(found, (BN, BJ))
    y = tl.sum(total, axis=1) * tl.load(scales + row).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)
    tl.store(out + split.to(tl.int64) * N + rn, y.to(out.dtype.element_ty), mask=rn < N)
