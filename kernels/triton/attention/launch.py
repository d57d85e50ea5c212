"""Launchers of the attention kernels: tile sizes, number of splits and grids, all from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.ops.attention import attend, check_heads
from qcompiler.kernels.triton.attention.decode import combine_kernel, decode_kernel
from qcompiler.kernels.triton.attention.prefill import prefill_kernel
from qcompiler.kernels.triton.launch import early_start, next_power_of_2, on_device, sm_count

MIN_DOT = 16  # smallest tile side that `tl.dot` takes
_MAX_SPLITS = 64


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, and how it is scheduled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_tile(rows: int, head_dim: int, itemsize: int) -> Tile:
    """Tile of the prefill kernel.

    Args:
        rows: Query rows that the longest sequence gives one key head (tokens · heads of a group).
        head_dim: Larger of the key and value head dimensions, padded to a power of two.
        itemsize: Bytes per element of the cache.
    """
    block_m = min(max(next_power_of_2(rows), MIN_DOT), 128)
    if itemsize == 4:  # true fp32 products run on the plain ALUs and spill early
        return Tile(min(block_m, 32), 32, 8, 1) if head_dim <= 128 else Tile(16, 16, 8, 1)
    if head_dim <= 128:
        return Tile(block_m, 64, 8 if block_m == 128 else 4, 3)
    if head_dim <= 256:
        return Tile(block_m, 32, 8 if block_m >= 64 else 4, 2)
    return Tile(min(block_m, 32), 32, 8, 2)


def decode_tile(rows: int, head_dim: int, itemsize: int) -> Tile:
    """Tile of the decode kernel; arguments as in `prefill_tile`, rows being the heads of a group."""
    block_m = min(max(next_power_of_2(rows), MIN_DOT), 64)
    if itemsize == 4:
        return Tile(16, 32, 4, 1) if head_dim <= 128 else Tile(16, 16, 4 if head_dim <= 256 else 8, 1)
    if head_dim <= 256:
        return Tile(block_m, 64 if head_dim <= 128 else 32, 4, 3)
    return Tile(min(block_m, 16), 32, 8, 2)


def decode_splits(programs: int, max_keys: int, block_n: int, sms: int, per_sm: int = 2) -> int:
    """Number of key splits with which all programs run at once.

    Args:
        programs: Programs without splitting (sequences · key heads · head tiles).
        max_keys: Most keys that a sequence can have (pages in its block table · page size, or the window).
        block_n: Keys per tile; a split is never smaller than two tiles.
        sms: Streaming multiprocessors.
        per_sm: Programs that an SM is to hold.
    """
    wanted = max(1, per_sm * sms // max(programs, 1))
    useful = max(1, max_keys // (2 * block_n))
    return min(wanted, useful, _MAX_SPLITS)


def combine_splits(
    partial: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, query_start: torch.Tensor
) -> None:
    """Merge what the splits of a decode kernel wrote into `out`, zeros for padding rows.

    Args:
        partial: Means float32 [sequences, heads, splits, channels].
        lse: Log-sum-exps float32 [sequences, heads, splits], in log2 units.
        out: [tokens, heads, channels].
        query_start: int32 [sequences + 1].
    """
    sequences, heads, splits, channels = partial.shape
    tokens = out.shape[0]
    combine_kernel[(max(sequences, tokens), heads)](
        partial, lse, out, query_start, tokens, sequences, splits, out.stride(0), out.stride(1),
        HEADS=heads, DV=channels, BLOCK_DV=padded(channels), SPLITS_P2=next_power_of_2(splits),
        num_warps=4, **early_start(out.device),
    )  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::attention`; the plain cases go to torch's own fused kernels."""
    rows, head_dim = q.shape[2:]
    keys, channels = k.shape[2], v.shape[3]
    plain = not (window or chunk or softcap) and sinks is None and head_dim == channels
    if plain and (not causal or rows == keys):
        return attend(q, k, v, scale=scale, causal=causal, window=0, chunk=0, softcap=0.0, sinks=None)
    return dense_attention(q, k, v, scale, causal, window, chunk, softcap, sinks)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`qcompiler::attention` by the ragged kernel: the batch laid end to end."""
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[3], k.shape[3], scale)
    batch, _, rows, _ = q.shape
    steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out = _prefill(
        q.transpose(1, 2).flatten(0, 1),
        k.transpose(1, 2).flatten(0, 1),
        v.transpose(1, 2).flatten(0, 1),
        None,
        steps * rows,
        steps * k.shape[2],
        rows,
        scale,
        causal,
        window,
        chunk,
        softcap,
        sinks,
    )
    return out.unflatten(0, (batch, rows))


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::ragged_attention`."""
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[2], k.shape[2], scale)
    return _prefill(
        q, k, v, None, query_start, query_start, max_query_len, scale, causal, window, chunk, softcap, sinks
    )


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::paged_attention`."""
    check_heads(q.shape[1], k_pages.shape[2], v_pages.shape[2], q.shape[2], k_pages.shape[3], scale)
    options = (scale, causal, window, chunk, softcap, sinks)
    if max_query_len == 1:
        return _decode(q, k_pages, v_pages, block_table, query_start, seq_lens, *options)
    return _prefill(q, k_pages, v_pages, block_table, query_start, seq_lens, max_query_len, *options)


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor | None,
    query_start: torch.Tensor,
    key_index: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the prefill kernel; `key_index` is seq_lens for pages, key_start for keys laid end to end."""
    paged = block_table is not None
    tokens, heads, head_dim = q.shape
    kv_heads, channels = v.shape[-2], v.shape[-1]
    out = q.new_empty(tokens, heads, channels)
    if out.numel() == 0:
        return out
    q, k, v = _unit_stride(q, "q", True), _unit_stride(k, "k", not paged), _unit_stride(v, "v", not paged)
    group = heads // kv_heads
    block_d, block_dv = padded(head_dim), padded(channels)
    tile = prefill_tile(max_query_len * group, max(block_d, block_dv), k.element_size())
    tile_heads = min(group, tile.block_m)
    tile_tokens = tile.block_m // tile_heads
    sequences = query_start.shape[0] - 1
    grid = (tokens // tile_tokens + sequences + 1, kv_heads * -(-group // tile_heads))
    with on_device(q):
        prefill_kernel[grid](
            q, k, v, out, sinks, block_table, query_start, key_index, key_index,
            tokens, sequences, scale, softcap,
            q.stride(0), q.stride(1),
            *_cache_strides(k), *_cache_strides(v),
            block_table.stride(0) if block_table is not None else 0,
            out.stride(0), out.stride(1),
            D=head_dim, DV=channels, BLOCK_D=block_d, BLOCK_DV=block_dv,
            GROUP=group, TILE_HEADS=tile_heads, TILE_TOKENS=tile_tokens,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SEQUENCES_P2=next_power_of_2(sequences + 1),
            CAUSAL=causal, WINDOW=window, CHUNK=chunk, SOFTCAP=softcap > 0, SINKS=sinks is not None,
            PAGED=paged, PAGE_SIZE=k.shape[1] if paged else 1, PRECISION=_precision(q),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    page_size, kv_heads, channels = v_pages.shape[1:]
    out = q.new_empty(tokens, heads, channels)
    if out.numel() == 0:
        return out
    q = _unit_stride(q, "q", True)
    k_pages, v_pages = checked_pages(k_pages, "k_pages"), checked_pages(v_pages, "v_pages")
    group = heads // kv_heads
    block_d, block_dv = padded(head_dim), padded(channels)
    tile = decode_tile(group, max(block_d, block_dv), k_pages.element_size())
    tile_heads = min(group, tile.block_m)
    sequences = seq_lens.shape[0]
    head_programs = kv_heads * -(-group // tile_heads)
    max_keys = block_table.shape[1] * page_size
    for bound in (window, chunk):
        max_keys = min(max_keys, bound + tile.block_n) if bound > 0 else max_keys
    splits = decode_splits(sequences * head_programs, max_keys, tile.block_n, sm_count(q.device))
    covered = max(sequences, tokens)  # rows of no sequence are padding, which somebody must zero
    partial = lse = out
    if splits > 1:
        partial = torch.empty(sequences, heads, splits, channels, dtype=torch.float32, device=q.device)
        lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    with on_device(q):
        decode_kernel[(splits, head_programs, sequences if splits > 1 else covered)](
            q, k_pages, v_pages, out, partial, lse, sinks, block_table, query_start, seq_lens,
            tokens, sequences, splits, scale, softcap,
            q.stride(0), q.stride(1),
            *_cache_strides(k_pages), *_cache_strides(v_pages),
            block_table.stride(0), out.stride(0), out.stride(1),
            D=head_dim, DV=channels, BLOCK_D=block_d, BLOCK_DV=block_dv,
            GROUP=group, TILE_HEADS=tile_heads, KV_HEADS=kv_heads,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLIT=splits > 1,
            CAUSAL=causal, WINDOW=window, CHUNK=chunk, SOFTCAP=softcap > 0, SINKS=sinks is not None,
            PAGE_SIZE=page_size, PRECISION=_precision(q),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **early_start(q.device),
        )  # fmt: skip
        if splits > 1:
            combine_splits(partial, lse, out, query_start)
    return out


def padded(dim: int) -> int:
    """A head dimension as a block size: the power of two that holds it, no smaller than a dot's side."""
    return max(next_power_of_2(dim), MIN_DOT)


def _precision(q: torch.Tensor) -> str:
    # tf32 would drop 13 bits of fp32 inputs; the setting means nothing for 16-bit ones.
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _cache_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides (page, slot, head) of pages [pages, page_size, heads, D] or of keys [tokens, heads, D]."""
    return (x.stride(0), x.stride(1), x.stride(2)) if x.dim() == 4 else (0, x.stride(0), x.stride(1))


def checked_pages(pages: torch.Tensor, name: str) -> torch.Tensor:
    """The pages, whose channels must be neighbours.

    Raises:
        InvalidInputError: they are not.
    """
    return _unit_stride(pages, name, False)


def _unit_stride(x: torch.Tensor, name: str, may_copy: bool) -> torch.Tensor:
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    if not may_copy:
        raise InvalidInputError(
            f"attention: the channels of {name} are not contiguous (strides {tuple(x.stride())})",
            hint="Lay the cache out as [pages, page_size, heads, head_dim].",
        )
    return x.contiguous()
