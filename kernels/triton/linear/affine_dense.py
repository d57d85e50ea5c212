"""The dense weight of prepared affine tensors: what many tokens multiply with by the library's matmul."""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.triton.linear.affine_codes import (
    plane_bits,
    quad_bytes,
    spread_high,
    weights_of_floats,
    weights_of_pairs,
)


@triton.jit
def dequantize_sides_kernel(
    low,
    high,
    sides,
    out,
    N,
    K,
    side_stride,
    words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Grid (blocks of codes, cdiv(N, BN)): the weight [N, K] of dtype HALF, as the fused kernels use it."""
    PLANES: tl.constexpr = 8 if BITS < 4 else (4 if BITS < 8 else 2)
    TILE: tl.constexpr = PLANES * WIDTH
    HAS_HIGH: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 6
    BYTES: tl.constexpr = BITS == 8 and HALF == tl.bfloat16
    MAGIC: tl.constexpr = 0x43004300 if HALF == tl.bfloat16 else 0x64006400

    tile = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1).to(tl.int64)
    words_at = row[:, None] * words + tile * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    word = tl.load(low + words_at)
    upper = word
    if HAS_HIGH:
        upper = spread_high(tl.load(high + words_at), BITS)
    for j in tl.static_range(PLANES):
        group = (tile * TILE + j * WIDTH) // GROUP if GROUP else 0
        side = tl.load(sides + row * side_stride + group)[:, None]
        if BYTES:
            even, odd = quad_bytes(word, j, COMPILED)
            weight = weights_of_floats(even, odd, side, HALF, COMPILED)
        else:
            pair = plane_bits(word, upper, j, BITS, MAGIC, COMPILED)
            weight = weights_of_pairs(pair, side, BITS, HALF, COMPILED)
        k = tile * TILE + j * WIDTH + tl.arange(0, WIDTH)
        mask = (rn[:, None] < N) & (k[None, :] < K)
        tl.store(out + rn.to(tl.int64)[:, None] * K + k[None, :], weight.to(out.dtype.element_ty), mask=mask)
