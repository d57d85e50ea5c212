"""Scaled dot-product attention with what decoders add to it: grouped heads, windows, chunks, softcap, sinks.

    s_ij = scale · q_i·k_j            s_ij ← c · tanh(s_ij / c)      (softcap c, Gemma 2)
    o_i  = Σ_j exp(s_ij) v_j / (Σ_j exp(s_ij) + exp(sink))           over the keys j visible to i

`attend` is the dense core that the paged and the ragged op share. Statistics
and sums are fp32. A query that sees no key gives zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op

# Query rows handled at a time once a mask is needed: bounds the score matrix
# and lets keys outside a window or chunk be skipped.
_QUERY_BLOCK = 512


def key_range(first: int, last: int, keys: int, causal: bool, window: int, chunk: int) -> tuple[int, int]:
    """Bounds [lo, hi) of the keys that any query position in [first, last] may see.

    Args:
        first: Smallest query position, counted in keys; negative for a query before the first key.
        last: Largest query position.
        keys: Number of keys.
        causal: Keys after the query are hidden.
        window: Keys further than this are hidden; 0 is off.
        chunk: Only keys of the query's own chunk are visible; 0 is off.
    """
    lo, hi = 0, keys
    if causal:
        hi = min(hi, last + 1)
    if window > 0:
        lo = max(lo, first - window + 1 if causal else first - window)
        hi = hi if causal else min(hi, last + window + 1)
    if chunk > 0:
        lo = max(lo, first // chunk * chunk)
        hi = min(hi, (last // chunk + 1) * chunk)
    return lo, max(lo, hi)


def visible(
    queries: torch.Tensor, keys: torch.Tensor, causal: bool, window: int, chunk: int
) -> torch.Tensor | None:
    """Boolean mask of the keys that each query sees, or None when all are seen.

    Args:
        queries: Query positions int64 [..., T].
        keys: Key positions int64 [..., S].
        causal: Keys after the query are hidden.
        window: Causal: key j is seen by i iff i − j < window. Otherwise iff |i − j| ≤ window. 0 is off.
        chunk: Key j is seen by i iff i // chunk == j // chunk. 0 is off.
    """
    i, j = queries.unsqueeze(-1), keys.unsqueeze(-2)
    rules = []
    if causal:
        rules.append(j <= i)
    if window > 0:
        rules.append(i - j < window if causal else (i - j).abs() <= window)
    if chunk > 0:
        rules.append(torch.div(i, chunk, rounding_mode="floor") == torch.div(j, chunk, rounding_mode="floor"))
    mask: torch.Tensor | None = None
    for rule in rules:
        mask = rule if mask is None else mask & rule
    return mask


def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention under an explicit mask.

    Args:
        q: Queries [B, Hq, T, D].
        k: Keys [B, Hkv, S, D].
        v: Values [B, Hkv, S, Dv].
        mask: Boolean, broadcastable to [B, 1, T, S]. What a row that sees no key gives is up to the caller.
        scale: Factor on q·k.
        softcap: c of c · tanh(s / c); 0 is off.
        sinks: One extra logit per query head [Hq], or None.

    Returns:
        [B, Hq, T, Dv] in q.dtype.
    """
    batch, heads, rows, _ = q.shape
    group = heads // k.shape[1]
    if softcap == 0 and sinks is None:
        if (
            rows == 1
        ):  # the query heads of a group are rows of one matrix: no repeated keys, no GQA path needed
            folded = q.reshape(batch, k.shape[1], group, q.shape[-1])
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
            return out.reshape(batch, heads, 1, v.shape[-1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)

    # The heads of a group are rows of one matrix, so that no key is repeated; scores are [B, Hkv, G, T, S].
    grouped = q.float().reshape(batch, -1, group * rows, q.shape[-1])
    scores = torch.matmul(grouped, k.float().transpose(-1, -2)).mul_(scale).unflatten(2, (group, rows))
    if softcap > 0:
        scores = torch.tanh_(scores.div_(softcap)) * softcap  # not in place: tanh's gradient needs its value
    if mask is not None:
        scores.masked_fill_(~mask.unsqueeze(2), -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)  # any shift gives the same, so it carries no gradient
    if sinks is not None:
        sink = sinks.float().view(1, -1, group, 1, 1)
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    out = torch.matmul(weights.flatten(2, 3), v.float()).unflatten(2, (group, rows)) / total
    return out.flatten(1, 2).to(q.dtype)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention of T queries that are the last T of S positions.

    Args:
        q: Queries [B, Hq, T, D]; query i stands at position S − T + i.
        k: Keys [B, Hkv, S, D].
        v: Values [B, Hkv, S, Dv].
        scale: Factor on q·k.
        causal: See `visible`.
        window: See `visible`.
        chunk: See `visible`.
        softcap: See `softmax_attention`.
        sinks: See `softmax_attention`.

    Returns:
        [B, T, Hq, Dv] contiguous, in q.dtype.
    """
    batch, heads, rows, _ = q.shape
    keys, channels = k.shape[2], v.shape[-1]
    offset = keys - rows
    simple = softcap == 0 and sinks is None and window == 0 and chunk == 0
    if simple and rows > 0 and keys > 0 and (not causal or (rows == keys and q.shape[-1] == channels)):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=heads != k.shape[1]
        )
        return out.transpose(1, 2).contiguous()

    result = q.new_zeros(batch, rows, heads, channels)
    positions = torch.arange(keys, device=q.device)
    # Causal queries before the first key see nothing: their rows stay zero.
    begin = max(0, -offset) if causal else 0
    for start in range(begin, rows, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, rows)
        lo, hi = key_range(offset + start, offset + stop - 1, keys, causal, window, chunk)
        if lo >= hi:
            continue
        mask = None
        if stop - start > 1:  # what one query sees is an interval, which [lo, hi) already is
            queries = torch.arange(offset + start, offset + stop, device=q.device)
            mask = visible(queries, positions[lo:hi], causal, window, chunk)
        block = softmax_attention(
            q[:, :, start:stop],
            k[:, :, lo:hi],
            v[:, :, lo:hi],
            None if mask is None else mask[None, None],
            scale,
            softcap,
            sinks,
        )
        if mask is not None and offset < 0:
            block = block.masked_fill(~mask.any(-1).view(1, 1, -1, 1), 0.0)
        result[:, start:stop] = block.transpose(1, 2)
    return result


def check_heads(q_heads: int, k_heads: int, v_heads: int, q_dim: int, k_dim: int, scale: float) -> None:
    """Raise `InvalidInputError` unless head counts and dimensions fit together and the scale is positive."""
    if not scale > 0:
        raise InvalidInputError(f"attention: scale {scale} is not positive")
    if k_heads != v_heads or q_heads % k_heads != 0:
        raise InvalidInputError(
            f"attention: {q_heads} query heads cannot share {k_heads} key and {v_heads} value heads",
            hint="The number of query heads must be a multiple of the number of key/value heads.",
        )
    if q_dim != k_dim:
        raise InvalidInputError(f"attention: query head dimension {q_dim} is not the keys' {k_dim}")


def _reference(
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
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[3], k.shape[3], scale)
    return attend(
        q, k, v, scale=scale, causal=causal, window=window, chunk=chunk, softcap=softcap, sinks=sinks
    )


def _fake(
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
    check_heads(q.shape[1], k.shape[1], v.shape[1], q.shape[3], k.shape[3], scale)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


attention = register_op(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window, int chunk, float softcap, "
    "Tensor? sinks) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.attention.launch:attention",
)
