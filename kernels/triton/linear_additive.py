"""Triton kernels of `qcompiler::linear_additive` and their launcher; format in `formats/additive.py`.

- one token, one set of small codebooks: `linear_additive_tables` (its own file);
- few tokens otherwise: `linear_additive_lookup` sums codewords and multiplies on the float32 units; a
  codeword is one 16-byte load (group size 8) from a table that stays in the caches;
- many tokens: `linear_additive_gemm` dequantizes a tile and uses the tensor cores, the weight on the left so
  that it can come from registers.

Split-K parts are summed by a second kernel in a fixed order: results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.additive import num_groups
from qcompiler.kernels.ops.linear_additive import check_linear_additive
from qcompiler.kernels.ops.linear_additive_slices import check_linear_additive_slices
from qcompiler.kernels.triton.launch import on_device
from qcompiler.kernels.triton.linear_additive_books import books_fit, run_books
from qcompiler.kernels.triton.linear_additive_slices import run_slices, slices_fit
from qcompiler.kernels.triton.linear_additive_tables import additive_sums_kernel, additive_tables_kernel
from qcompiler.kernels.triton.linear_launch import split_target, sum_split

_MAX_LOOKUP_TOKENS = 4
_TABLE_ROWS = 512  # of the output, summed by one program
_TABLE_COLUMNS = 32  # one for each lane of a warp and each bank of shared memory
# Programs wanted on the device: a few for each of the 132 multiprocessors of an H100.
_PROGRAMS = 528


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


COMPILED = not isinstance(linear_additive_gemm, InterpretedFunction)


def linear_additive_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """`linear_additive` (see `ops/linear_additive.py`) by Triton; never waits for the device."""
    check_linear_additive(x, codes, codebooks, scales, rows, bits, in_features)
    sets, count, _, group_size = codebooks.shape
    out_features, columns = codes.shape
    flat = x.reshape(-1, in_features)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    tokens = flat.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    groups = num_groups(group_size, in_features)
    if COMPILED and books_fit(flat, codebooks):
        return run_books(flat, codes, codebooks, scales, bias).view(*x.shape[:-1], out_features)
    # Measured on an H100: tables of several tokens lose to looking up.
    if bits == 8 and sets == 1 and tokens == 1:
        y = _by_tables(flat, codes, codebooks, scales, bias)
        return y.view(*x.shape[:-1], out_features)
    lookup = tokens <= _MAX_LOOKUP_TOKENS
    block_m = triton.next_power_of_2(tokens) if lookup else min(64, max(16, triton.next_power_of_2(tokens)))
    block_n = 16 // block_m if lookup else 64
    # Elements of K per step: 256 in the look-up, 64 before the tensor cores; the dot needs at least 16.
    block_g = (256 if lookup else 64) // group_size
    tiles_n = triton.cdiv(out_features, block_n) * (1 if lookup else triton.cdiv(tokens, block_m))
    tiles_k = triton.cdiv(groups, block_g)
    per_split = triton.cdiv(tiles_k, max(1, min(tiles_k, 16, _PROGRAMS // tiles_n)))
    split = triton.cdiv(tiles_k, per_split)
    out, target = split_target(flat, out_features, split)
    kernel = linear_additive_lookup if lookup else linear_additive_gemm
    with on_device(x):
        kernel[(tiles_n, split)](
            flat,
            codes,
            codebooks,
            scales,
            rows,
            bias if bias is not None else scales,
            target,
            tokens,
            out_features,
            in_features,
            groups,
            columns,
            flat.stride(0),
            per_split,
            BITS=bits,
            COUNT=count,
            D=group_size,
            SETS=sets,
            BN=block_n,
            BG=block_g,
            BM=block_m,
            SPLIT=split,
            HAS_BIAS=bias is not None and split == 1,
            num_warps=4,
            **({} if lookup else {"COMPILED": COMPILED, "num_stages": 3}),
        )
        sum_split(target, bias, out)
    return out.view(*x.shape[:-1], out_features)


def linear_additive_slices_triton(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    tables: torch.Tensor,
    table_scale: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """`linear_additive_slices` (see `ops/`) by Triton; never waits for the device."""
    check_linear_additive_slices(x, codes, codebooks, tables, table_scale, scales, rows, bits, in_features)
    flat = x.reshape(-1, in_features)
    if flat.shape[0] == 0 or not (COMPILED and slices_fit(flat)):
        return linear_additive_triton(x, codes, codebooks, scales, rows, bias, bits, in_features)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return run_slices(flat, codes, tables, table_scale, scales, bias).view(*x.shape[:-1], codes.shape[0])


def _by_tables(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One token, x [1, in_features]; codebooks of 8 bits, one set."""
    out_features, columns = codes.shape
    _, count, codewords, group_size = codebooks.shape
    tiles = triton.cdiv(columns, _TABLE_COLUMNS)
    programs = triton.cdiv(out_features, _TABLE_ROWS)
    per_split = triton.cdiv(tiles, max(1, min(tiles, 32, _PROGRAMS // programs)))
    split = triton.cdiv(tiles, per_split)
    tables = x.new_empty((tiles, codewords, _TABLE_COLUMNS), dtype=torch.float32)
    out, target = split_target(x, out_features, split)
    with on_device(x):
        additive_tables_kernel[(tiles, codewords // 32)](
            x,
            codebooks,
            tables,
            x.shape[1],
            columns,
            COUNT=count,
            D=group_size,
            CODES=codewords,
            BC=32,
            BJ=_TABLE_COLUMNS,
            num_warps=4,
        )
        additive_sums_kernel[(programs, split)](
            tables,
            codes,
            scales,
            bias if bias is not None else scales,
            target,
            out_features,
            columns,
            tiles,
            per_split,
            0,
            CODES=codewords,
            BN=_TABLE_ROWS,
            BJ=_TABLE_COLUMNS,
            SPLIT=split,
            HAS_BIAS=bias is not None and split == 1,
            num_warps=16,
        )
        return sum_split(target, bias, out)
