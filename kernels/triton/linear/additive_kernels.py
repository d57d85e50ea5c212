"""Triton kernels of `qcompiler::linear_additive` for every scheme; format in `formats/additive.py`.

- few tokens: `linear_additive_lookup` sums codewords and multiplies on the float32 units; a codeword is one
  16-byte load (group size 8) from a table that stays in the caches;
- more tokens: `linear_additive_gemm` dequantizes a tile and uses the tensor cores, the weight on the left so
  that it can come from registers;
- many tokens: `additive_dense_kernel` writes the weight out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _set_of_rows(row_counts, row, SETS: tl.constexpr):
    """Which set of codebooks each row uses."""
    found = row * 0
    end = 0
    for p in tl.static_range(SETS - 1):
        end += tl.load(row_counts + p)
        found += (row >= end).to(tl.int32)
    return found


@triton.jit
def _load_codes(codes, row, columns, index, BITS: tl.constexpr):
    """Codes int32 [BN, BG]: number `index` [BG] of each row [BN]."""
    first = row.to(tl.int64)[:, None] * columns
    if BITS == 8:
        return tl.load(codes + first + index[None, :]).to(tl.int32)
    elif BITS == 16:
        return tl.load(codes + first + index[None, :]).to(tl.int32) & 0xFFFF
    else:
        bit = index * BITS
        byte = bit >> 3
        word = tl.load(codes + first + byte[None, :]).to(tl.int32)
        # Bytes past the row's end hold no bits of this code: any byte will do there.
        word |= tl.load(codes + first + tl.minimum(byte + 1, columns - 1)[None, :]).to(tl.int32) << 8
        if BITS > 9:
            word |= tl.load(codes + first + tl.minimum(byte + 2, columns - 1)[None, :]).to(tl.int32) << 16
        return (word >> (bit & 7)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def _sum_codewords(
    codes,
    codebooks,
    row,
    book,
    group,
    columns,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
):
    """float32 [BN, BG·D]: the groups `group` [BG] of the rows [BN], without the scale."""
    lane = tl.arange(0, D)
    total = tl.zeros((row.shape[0], group.shape[0], D), dtype=tl.float32)
    for m in tl.static_range(COUNT):
        code = _load_codes(codes, row, columns, group * COUNT + m, BITS)
        entry = ((book * COUNT + m) << BITS)[:, None] + code
        at = entry.to(tl.int64)[:, :, None] * D + lane[None, None, :]
        total += tl.load(codebooks + at, eviction_policy="evict_last").to(tl.float32)
    return tl.reshape(total, (row.shape[0], group.shape[0] * D))


@triton.jit
def linear_additive_lookup(
    x,
    codes,
    codebooks,
    scales,
    row_counts,
    bias,
    out,
    M,
    N,
    K,
    G,
    columns,
    x_stride,
    tiles_per_split,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SETS: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Grid (cdiv(N, BN), SPLIT): out [M, N] in x's dtype, or float32 parts [SPLIT, M, N] when SPLIT > 1."""
    split = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.arange(0, BM)
    # Rows and groups past the end read the last one; their x is zero or they are not stored.
    row = tl.minimum(rn, N - 1)
    book = _set_of_rows(row_counts, row, SETS)
    acc = tl.zeros((BM, BN, BG * D), dtype=tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(G, BG))
    for tile in range(split * tiles_per_split, last):
        group = tl.minimum(tile * BG + tl.arange(0, BG), G - 1)
        weight = _sum_codewords(codes, codebooks, row, book, group, columns, BITS, COUNT, D)
        k = tile * (BG * D) + tl.arange(0, BG * D)
        mask = (rm[:, None] < M) & (k[None, :] < K)
        xs = tl.load(x + rm.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        acc += weight[None, :, :] * xs.to(tl.float32)[:, None, :]
    y = tl.sum(acc, 2) * tl.load(scales + row).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + row).to(tl.float32)[None, :]
    at = (split * M + rm).to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def linear_additive_gemm(
    x,
    codes,
    codebooks,
    scales,
    row_counts,
    bias,
    out,
    M,
    N,
    K,
    G,
    columns,
    x_stride,
    tiles_per_split,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SETS: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(N, BN)·cdiv(M, BM), SPLIT): out as for `linear_additive_lookup`.

    Not COMPILED (in the interpreter, whose bf16 arithmetic is wrong) the dot is in float32.
    """
    split = tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    rn = tl.program_id(0) // tiles_m * BN + tl.arange(0, BN)
    rm = tl.program_id(0) % tiles_m * BM + tl.arange(0, BM)
    row = tl.minimum(rn, N - 1)
    book = _set_of_rows(row_counts, row, SETS)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(G, BG))
    for tile in range(split * tiles_per_split, last):
        group = tl.minimum(tile * BG + tl.arange(0, BG), G - 1)
        weight = _sum_codewords(codes, codebooks, row, book, group, columns, BITS, COUNT, D)
        k = tile * (BG * D) + tl.arange(0, BG * D)
        mask = (rm[None, :] < M) & (k[:, None] < K)
        xt = tl.load(x + rm.to(tl.int64)[None, :] * x_stride + k[:, None], mask=mask, other=0.0)
        if COMPILED:
            acc = tl.dot(weight.to(xt.dtype), xt, acc, input_precision="ieee")
        else:
            acc = tl.dot(weight, xt.to(tl.float32), acc, input_precision="ieee")
    acc *= tl.load(scales + row).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    at = (split * M + rm).to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(rn[:, None] < N) & (rm[None, :] < M))


@triton.jit
def additive_dense_kernel(
    codes,
    codebooks,
    scales,
    row_counts,
    out,
    N,
    K,
    G,
    columns,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SETS: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """Grid (cdiv(G, BG), cdiv(N, BN)): the weight [N, K] in the dtype of `out`."""
    tile = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    book = _set_of_rows(row_counts, row, SETS)
    group = tl.minimum(tile * BG + tl.arange(0, BG), G - 1)
    weight = _sum_codewords(codes, codebooks, row, book, group, columns, BITS, COUNT, D)
    weight *= tl.load(scales + row).to(tl.float32)[:, None]
    k = tile * (BG * D) + tl.arange(0, BG * D)
    mask = (rn[:, None] < N) & (k[None, :] < K)
    tl.store(out + rn.to(tl.int64)[:, None] * K + k[None, :], weight.to(out.dtype.element_ty), mask=mask)
