"""Rows of an affine table, gathered and dequantized in one kernel; equal to the reference bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width, num_groups
from qcompiler.kernels.ops.embedding_affine import check_embedding_affine
from qcompiler.kernels.triton.launch import cdiv, on_device
from qcompiler.kernels.triton.linear.affine_codes import interleave, plane_floats, spread_high

_BLOCK_TOKENS = 8


@triton.jit(do_not_specialize=["tokens"])
def embedding_affine_kernel(
    ids,
    low,
    high,
    scales,
    zeros,
    out,
    tokens,
    N,
    K,
    GROUPS,
    words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (cdiv(tokens, BT), K tiles): out [tokens, K]. An id outside of [0, N) gives a row of NaN."""
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    LANES: tl.constexpr = WIDTH if WIDTH > 16 else 16
    BLOCK: tl.constexpr = PLANES * WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    CODE_BIAS: tl.constexpr = -128.0 if BITS == 8 else 128.0

    token = tl.program_id(0) * BT + tl.arange(0, BT)
    tile = tl.program_id(1)
    row = tl.load(ids + token, mask=token < tokens, other=0).to(tl.int64)
    inside = (row >= 0) & (row < N)
    row = tl.where(inside, row, 0)
    at = tl.minimum(tile * (LANES // 2) + tl.arange(0, LANES // 2), words - 1)
    lane = tl.arange(0, LANES)
    position = (lane // WIDTH) * BLOCK + lane % WIDTH
    words_at = row[:, None] * words + at[None, :]
    word = tl.load(low + words_at)
    upper = word
    if HAS_HIGH:
        upper = spread_high(tl.load(high + words_at), BITS)
    for j in tl.static_range(PLANES):
        even, odd = plane_floats(word, upper, j, BITS, COMPILED)
        codes = interleave(even, odd)
        k = tile * PLANES * LANES + j * WIDTH + position
        groups = tl.minimum(k // GROUP, GROUPS - 1) if GROUP else k * 0
        at_scale = groups.to(tl.int64)[None, :] * N + row[:, None]
        scale = tl.load(scales + at_scale).to(tl.float32)
        zero = tl.load(zeros + at_scale).to(tl.float32)
        # The bias of the code comes off first: it is exact, while zero + bias is not.
        weight = ((codes - CODE_BIAS) - zero) * scale
        weight = tl.where(inside[:, None], weight, float("nan"))
        mask = (token[:, None] < tokens) & (k[None, :] < K)
        target = out + token.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(target, weight.to(out.dtype.element_ty), mask=mask)


COMPILED = not isinstance(embedding_affine_kernel, InterpretedFunction)


def embedding_affine_triton(
    ids: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """CUDA provider of `qcompiler::embedding_affine`."""
    check_embedding_affine(ids, low, high, scales, zeros, bits, group_size, embedding_dim)
    out = low.new_empty((*ids.shape, embedding_dim), dtype=dtype)
    if out.numel() == 0:
        return out
    ids = ids.contiguous()
    width = block_width(bits, group_size, embedding_dim)
    grid = (
        cdiv(ids.numel(), _BLOCK_TOKENS),
        cdiv(embedding_dim, PLANES[bits] * max(width, 16)),
    )
    with on_device(ids):
        embedding_affine_kernel[grid](
            ids, low, high if high is not None else low, scales, zeros, out,
            ids.numel(), low.shape[0], embedding_dim, num_groups(group_size, embedding_dim), low.shape[1],
            BITS=bits, GROUP=group_size, WIDTH=width, BT=_BLOCK_TOKENS, COMPILED=COMPILED, num_warps=2,
        )  # fmt: skip
    return out
