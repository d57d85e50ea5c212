"""Launchers of `qcompiler::linear_additive` and `linear_additive_slices`: which kernel runs, and how.

- up to 32 tokens, codebooks that fit shared memory: `additive_books.py` (8- and 12-bit
  codes) and `additive_slices.py` (16-bit codes, prepared weights), each in a file of its own;
- one token otherwise, one set of small codebooks: `additive_tables.py`;
- all else: `additive_kernels.py`, and the library's matmul for many tokens.

Split-K parts are summed by a second kernel in a fixed order: results are reproducible bit for bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import num_groups
from qcompiler.kernels.ops.linear_additive import check_linear_additive
from qcompiler.kernels.ops.linear_additive_slices import check_linear_additive_slices
from qcompiler.kernels.triton.launch import cdiv, on_device, token_rows
from qcompiler.kernels.triton.linear.additive_books import books_config, books_fit, run_books
from qcompiler.kernels.triton.linear.additive_kernels import (
    additive_dense_kernel,
    linear_additive_gemm,
    linear_additive_lookup,
)
from qcompiler.kernels.triton.linear.additive_slices import run_slices, slices_config, slices_fit
from qcompiler.kernels.triton.linear.additive_tables import additive_sums_kernel, additive_tables_kernel
from qcompiler.kernels.triton.linear.launch import measured_config, multiprocessors, split_target, sum_split
from qcompiler.kernels.tuning.tables import LinearConfig

# Whether kernels with a table in shared memory run where nothing was measured.
SHARED_BY_DEFAULT = True
_MAX_SHARED_TOKENS = 32
_MAX_LOOKUP_TOKENS = 4
_MAX_GEMM_TOKENS = 128
_TABLE_ROWS = 512  # of the output, summed by one program
_TABLE_COLUMNS = 32  # one for each lane of a warp and each bank of shared memory
# Programs wanted on the device: a few for each of the 132 multiprocessors of an H100.
_PROGRAMS = 528

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
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_additive` (see `ops/linear_additive.py`) by Triton; never waits for the device.

    `config` overrides the tuning table, which overrides the heuristic. Of "gemv", "gemm" and "dense" it
    chooses the kernel alone, of "shared" the sizes too.

    Raises:
        InvalidInputError: A config "shared" for what `books_fit` refuses or of sizes that do not go together,
            or one of an unknown kind.
    """
    check_linear_additive(x, codes, codebooks, scales, rows, bits, in_features)
    flat = token_rows(x)
    out_features = codes.shape[0]
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    shared = COMPILED and books_fit(flat, codes, codebooks)
    if config is None:
        config = _measured(flat, codebooks, out_features, shared) or heuristic(
            flat.shape[0],
            out_features,
            in_features,
            (bits, codebooks.shape[1]) if shared and SHARED_BY_DEFAULT else None,
            multiprocessors(x.device),
        )
    if config.kind == "shared":
        if not shared:
            raise InvalidInputError("linear_additive: these codebooks or tokens do not fit a shared table.")
        _check_sizes(config)
        y = run_books(flat, codes, codebooks, scales, bias, config)
    elif config.kind == "dense":
        y = _by_dense(flat, codes, codebooks, scales, rows, bias, bits)
    elif config.kind == "gemv" and bits == 8 and codebooks.shape[0] == 1 and flat.shape[0] == 1:
        y = _by_tables(flat, codes, codebooks, scales, bias)
    elif config.kind in ("gemv", "gemm"):
        y = _by_lookup(flat, codes, codebooks, scales, rows, bias, bits, few=config.kind == "gemv")
    else:
        raise InvalidInputError(f"linear_additive has no kernel of kind {config.kind!r}.")
    return y.view(*x.shape[:-1], out_features)


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
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_additive_slices` (see `ops/`) by Triton; `config` as for `linear_additive_triton`."""
    check_linear_additive_slices(x, codes, codebooks, tables, table_scale, scales, rows, bits, in_features)
    flat = token_rows(x)
    fits = COMPILED and flat.shape[0] > 0 and slices_fit(flat)
    if config is None and fits:
        sms = multiprocessors(x.device)
        config = _measured(flat, codebooks, codes.shape[0], True)
        if config is None and SHARED_BY_DEFAULT:
            config = slices_config(flat.shape[0], codes.shape[0], in_features, sms)
    if fits and config is not None and config.kind == "shared":
        _check_sizes(config)
        y = run_slices(flat, codes, tables, table_scale, scales, bias, config)
        return y.view(*x.shape[:-1], codes.shape[0])
    return linear_additive_triton(x, codes, codebooks, scales, rows, bias, bits, in_features, config)


def _check_sizes(config: LinearConfig) -> None:
    rows = 16 * config.num_warps
    if config.block_n % rows or any(n & (n - 1) for n in (config.block_n, config.num_warps)):
        raise InvalidInputError(
            f"linear_additive: {config.num_warps} warps take powers of two of rows from {rows} on, not "
            f"{config.block_n}."
        )


def weight_key(codebooks: torch.Tensor) -> str:
    """Op and format in keys of the tuning table; codebooks [sets, M, 2^bits, d]."""
    _, count, codewords, group_size = codebooks.shape
    return f"linear_additive/{count}x{codewords.bit_length() - 1}-g{group_size}"


@lru_cache(maxsize=4096)
def heuristic(
    tokens: int,
    out_features: int,
    in_features: int,
    shared: tuple[int, int] | None,
    sms: int,
) -> LinearConfig:
    """A sane configuration where nothing was measured.

    Codebooks in shared memory where they fit (`shared`: their bits and number); else few tokens by look-up,
    more on the tensor cores, and where the same codewords would be looked up for many tiles of tokens, once
    for all of them.
    """
    if shared is not None and tokens <= _MAX_SHARED_TOKENS:
        return books_config(tokens, out_features, in_features, *shared, sms)
    if tokens <= _MAX_LOOKUP_TOKENS:
        return LinearConfig("gemv")
    return LinearConfig("gemm" if tokens <= _MAX_GEMM_TOKENS else "dense")


def _measured(
    x: torch.Tensor, codebooks: torch.Tensor, out_features: int, shared: bool
) -> LinearConfig | None:
    found = measured_config(weight_key(codebooks), x, out_features)
    return None if found is not None and found.kind == "shared" and not shared else found


def _by_lookup(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    *,
    few: bool,
) -> torch.Tensor:
    """For x [tokens, in_features]; on the float32 units (`few`, up to 16 tokens) or the tensor cores."""
    sets, count, _, group_size = codebooks.shape
    out_features, columns = codes.shape
    tokens, in_features = x.shape
    groups = num_groups(group_size, in_features)
    rounded = triton.next_power_of_2(tokens)
    block_m = rounded if few else min(64, max(16, rounded))
    block_n = max(1, 16 // block_m) if few else 64
    # Elements of K per step: 256 in the look-up, 64 before the tensor cores; the dot needs at least 16.
    block_g = (256 if few else 64) // group_size
    tiles_n = cdiv(out_features, block_n) * (1 if few else cdiv(tokens, block_m))
    tiles_k = cdiv(groups, block_g)
    per_split = cdiv(tiles_k, max(1, min(tiles_k, 16, _PROGRAMS // tiles_n)))
    split = cdiv(tiles_k, per_split)
    out, target = split_target(x, out_features, split)
    kernel = linear_additive_lookup if few else linear_additive_gemm
    with on_device(x):
        kernel[(tiles_n, split)](
            x,
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
            x.stride(0),
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
            **({} if few else {"COMPILED": COMPILED, "num_stages": 3}),
        )
        return sum_split(target, bias, out)


def _by_dense(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """For x [tokens, in_features]; the weight is written out once, for the library's matmul."""
    sets, count, _, group_size = codebooks.shape
    out_features, columns = codes.shape
    in_features = x.shape[1]
    groups = num_groups(group_size, in_features)
    weight = x.new_empty((out_features, in_features))
    block_n, block_g = 16, 256 // group_size
    with on_device(x):
        additive_dense_kernel[(cdiv(groups, block_g), cdiv(out_features, block_n))](
            codes,
            codebooks,
            scales,
            rows,
            weight,
            out_features,
            in_features,
            groups,
            columns,
            BITS=bits,
            COUNT=count,
            D=group_size,
            SETS=sets,
            BN=block_n,
            BG=block_g,
            num_warps=4,
        )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


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
    tiles = cdiv(columns, _TABLE_COLUMNS)
    programs = cdiv(out_features, _TABLE_ROWS)
    per_split = cdiv(tiles, max(1, min(tiles, 32, _PROGRAMS // programs)))
    split = cdiv(tiles, per_split)
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
