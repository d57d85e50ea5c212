"""From logits to the next step's token ids on the device: the likeliest token of each row, and ids by row.

Ties go to the lower id, as in `torch.argmax` on the CPU. A row is read by many programs, each of which
leaves its largest logit and where it is; one program a row makes a token of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.triton.launch import cdiv, next_power_of_2, on_device

_BLOCK = 2048
_FEED_BLOCK = 256


@triton.jit
def _partial_kernel(logits, values, indices, N, stride, BLOCK: tl.constexpr):
    """Grid (rows, cdiv(N, BLOCK)): largest logit of a block [rows, blocks], NaN as +inf, and its id."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < N, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    best = tl.max(x, 0)
    index = tl.min(tl.where(x == best, at, 0x7FFFFFFF), 0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values + place, best)
    tl.store(indices + place, index)


@triton.jit
def _final_kernel(values, indices, tokens, kept, blocks, BLOCKS: tl.constexpr):
    """Grid (rows,): the token of a row, −1 unless its largest logit is a number, to both outputs."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    x = tl.load(values + row * blocks + at, mask=at < blocks, other=float("-inf"))
    index = tl.load(indices + row * blocks + at, mask=at < blocks, other=0x7FFFFFFF)
    best = tl.max(x, 0)
    token = tl.min(tl.where(x == best, index, 0x7FFFFFFF), 0)
    finite = (best > float("-inf")) & (best < float("inf"))
    token = tl.where(finite, token, -1).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(kept + row, token)


@triton.jit
def _feed_kernel(ids, feeds, kept, out, count, BLOCK: tl.constexpr):
    """Grid (cdiv(count, BLOCK),): out [count]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    feed = tl.load(feeds + at, mask=inside, other=-1)
    known = tl.load(ids + at, mask=inside, other=0)
    token = tl.load(kept + tl.maximum(feed, 0), mask=inside & (feed >= 0), other=0)
    tl.store(out + at, tl.where(feed < 0, known, tl.maximum(token, 0)), mask=inside)


def greedy_tokens(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row.

    Args:
        logits: [rows, vocabulary], float32, float16 or bfloat16, each row contiguous.
        kept: int64 [at least rows]; gets the tokens too.

    Returns:
        int64 [rows]; −1 where a row holds NaN or +inf, or nothing finite.
    """
    rows, vocabulary = logits.shape
    blocks = cdiv(vocabulary, _BLOCK)
    values = logits.new_empty((rows, blocks), dtype=torch.float32)
    indices = logits.new_empty((rows, blocks), dtype=torch.int32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    with on_device(logits):
        _partial_kernel[rows, blocks](
            logits, values, indices, vocabulary, logits.stride(0), BLOCK=_BLOCK, num_warps=4
        )
        _final_kernel[(rows,)](
            values, indices, tokens, kept, blocks, BLOCKS=next_power_of_2(blocks), num_warps=1
        )
    return tokens


def feed_tokens(ids: torch.Tensor, feeds: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Token ids of a step of which some are known only here.

    Args:
        ids: int64 [1, tokens], those that the host knows.
        feeds: int64 [tokens], for each the row of `kept` that holds it instead; −1 for none.
        kept: int64 [rows]; −1 stands for no token and gives 0.

    Returns:
        int64 [1, tokens].
    """
    out = torch.empty_like(ids)
    count = ids.numel()
    with on_device(ids):
        _feed_kernel[(cdiv(count, _FEED_BLOCK),)](
            ids, feeds, kept, out, count, BLOCK=_FEED_BLOCK, num_warps=2
        )
    return out
