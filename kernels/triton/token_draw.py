"""A token of each row drawn by inverting its cumulative distribution at one uniform number, in fp64.

Programs over blocks of a row leave the mass of their block and its last possible token; one program a row
finds the block in which the number falls, and the token in that block. Nothing of the size of the row is
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.triton.launch import cdiv, next_power_of_2, on_device

_BLOCK = 2048


@triton.jit
def _mass_kernel(scores, highest, masses, last, N, stride, BLOCK: tl.constexpr):
    """Grid (rows, cdiv(N, BLOCK)): a block's largest score, its Σ exp(score − largest), its last token."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row.to(tl.int64) * stride + at, mask=at < N, other=float("-inf"))
    best = tl.max(x, 0)
    shift = tl.where(best > float("-inf"), best, 0.0)
    mass = tl.sum(tl.exp(x.to(tl.float64) - shift.to(tl.float64)), 0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(highest + place, best)
    tl.store(masses + place, mass)
    tl.store(last + place, tl.max(tl.where(x > float("-inf"), at, -1), 0))


@triton.jit
def _draw_kernel(
    scores, highest, masses, last, uniforms, tokens, N, stride, blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows,): the first token at which the cumulative mass passes the row's number."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    best = tl.load(highest + row * blocks + block, mask=block < blocks, other=float("-inf"))
    mass = tl.load(masses + row * blocks + block, mask=block < blocks, other=0.0)
    ends = tl.load(last + row * blocks + block, mask=block < blocks, other=-1)
    shift = tl.max(best, 0).to(tl.float64)
    mass = tl.where(best > float("-inf"), mass * tl.exp(best.to(tl.float64) - shift), 0.0)
    passed = tl.cumsum(mass, 0)
    target = tl.load(uniforms + row) * tl.max(passed, 0)
    chosen = tl.sum((passed <= target).to(tl.int32), 0)
    # Rounding may leave the number beyond everything: the last possible token then.
    chosen = tl.maximum(tl.minimum(chosen, tl.max(tl.where(ends >= 0, block, -1), 0)), 0)
    before = tl.sum(tl.where(block == chosen - 1, passed, 0.0), 0)
    end = tl.sum(tl.where(block == chosen, ends, 0), 0)
    at = chosen * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row.to(tl.int64) * stride + at, mask=at < N, other=float("-inf"))
    inside = before + tl.cumsum(tl.exp(x.to(tl.float64) - shift), 0)
    token = chosen * BLOCK + tl.sum((inside <= target).to(tl.int32), 0)
    tl.store(tokens + row, tl.maximum(tl.minimum(token, end), 0).to(tl.int64))


def draw_tokens(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row.

    Args:
        scores: fp32 [rows, vocabulary], logits of which −inf is never drawn; each row contiguous.
        uniforms: fp64 [rows], in [0, 1).

    Returns:
        int64 [rows]; any token for a row with NaN or without a finite score.
    """
    rows, vocabulary = scores.shape
    blocks = cdiv(vocabulary, _BLOCK)
    highest = scores.new_empty((rows, blocks))
    masses = scores.new_empty((rows, blocks), dtype=torch.float64)
    last = scores.new_empty((rows, blocks), dtype=torch.int32)
    tokens = scores.new_empty(rows, dtype=torch.int64)
    stride = scores.stride(0)
    with on_device(scores):
        _mass_kernel[rows, blocks](
            scores, highest, masses, last, vocabulary, stride, BLOCK=_BLOCK, num_warps=8
        )
        _draw_kernel[(rows,)](
            scores, highest, masses, last, uniforms, tokens, vocabulary, stride, blocks,
            BLOCKS=next_power_of_2(blocks), BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return tokens
