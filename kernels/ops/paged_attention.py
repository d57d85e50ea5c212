"""Attention of ragged queries over a paged KV cache.

The keys of sequence s are the first `seq_lens[s]` slots of the pages that
`block_table[s]` lists (Kwon et al. 2023, "PagedAttention"). One op serves
prefill, chunked prefill, decode and their mixtures; semantics of the rest as
in `attention`.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.attention import attend, check_heads, softmax_attention

# Attending all decoded sequences at once, padded to the longest, saves the per-sequence overhead. It loses to
# the loop once the copy of the keys leaves the core's cache (bytes), or is mostly padding (padded over real).
_MAX_BATCHED = 2 << 20
_MAX_PADDING = 2.0


def _reference(
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
    check_heads(q.shape[1], k_pages.shape[2], v_pages.shape[2], q.shape[2], k_pages.shape[3], scale)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    live = [s for s, n in enumerate(lengths) if n > 0 and starts[s + 1] > starts[s]]
    out = q.new_zeros(q.shape[0], q.shape[1], v_pages.shape[-1])

    decode = all(starts[s + 1] - starts[s] == 1 for s in live)
    padded = max((lengths[s] for s in live), default=0) * len(live)
    small = padded * k_pages.stride(1) * k_pages.element_size() <= _MAX_BATCHED
    dense = padded <= _MAX_PADDING * sum(lengths[s] for s in live)
    if decode and causal and len(live) > 1 and small and dense:
        index = torch.tensor(live, device=q.device)
        rows = query_start[index].long()
        out[rows] = _decode(
            q[rows],
            k_pages,
            v_pages,
            block_table[index],
            seq_lens[index],
            scale,
            window,
            chunk,
            softcap,
            sinks,
        )
        return out

    page_size = k_pages.shape[1]
    for s in live:
        first, last, length = starts[s], starts[s + 1], lengths[s]
        pages = block_table[s, : -(-length // page_size)]
        out[first:last] = attend(
            q[first:last].transpose(0, 1).unsqueeze(0),
            _gather(k_pages, pages, length),
            _gather(v_pages, pages, length),
            scale=scale,
            causal=causal,
            window=window,
            chunk=chunk,
            softcap=softcap,
            sinks=sinks,
        )[0]
    return out


def _gather(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Cache rows of one sequence as [1, H, length, D]; a view when its pages are adjacent."""
    indices = table.tolist()
    first = indices[0]
    if indices == list(range(first, first + len(indices))) and pages.is_contiguous():
        rows = pages[first : first + len(indices)]
    else:
        rows = pages.index_select(0, table)
    return rows.flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)


def _rows(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Cache rows [*slots.shape, H, D] of the slots."""
    page_size = pages.shape[1]
    if pages.stride(0) != page_size * pages.stride(1):  # flattening would copy the cache
        return pages[slots // page_size, slots % page_size]
    return pages.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)


def _decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query per sequence, causal: what it sees is an interval, so pad the intervals and attend once."""
    lengths = seq_lens.long()
    page_size = k_pages.shape[1]
    low = torch.zeros_like(lengths)
    if window > 0:
        low = (lengths - window).clamp_min(0)
    if chunk > 0:
        low = torch.maximum(low, (lengths - 1) // chunk * chunk)
    counts = lengths - low
    offsets = torch.arange(int(counts.max()), device=q.device)
    # Padding repeats the last visible key: slots outside the sequence may hold anything, NaN included.
    keys = torch.minimum(low[:, None] + offsets, lengths[:, None] - 1)
    slots = torch.gather(block_table.long(), 1, keys // page_size) * page_size + keys % page_size
    uniform = bool((counts == offsets.numel()).all())
    mask = None if uniform else (offsets < counts[:, None])[:, None, None, :]
    out = softmax_attention(
        q.unsqueeze(2),
        _rows(k_pages, slots).transpose(1, 2),
        _rows(v_pages, slots).transpose(1, 2),
        mask,
        scale,
        softcap,
        sinks,
    )
    return out.squeeze(2)


def _fake(
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
    check_heads(q.shape[1], k_pages.shape[2], v_pages.shape[2], q.shape[2], k_pages.shape[3], scale)
    return q.new_empty((q.shape[0], q.shape[1], v_pages.shape[3]))


paged_attention = register_op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor query_start, "
    "Tensor seq_lens, SymInt max_query_len, float scale, bool causal, int window, int chunk, float softcap, "
    "Tensor? sinks) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.launch:paged_attention",
)
