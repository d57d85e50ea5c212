"""Codes packed into the affine format's words (`qcompiler.kernels.formats.affine`) at the memory's speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.formats.affine import AFFINE, AffineSpec, block_width
from qcompiler.kernels.triton.launch import cdiv, next_power_of_2, on_device

_TILE_WORDS = 512


@triton.jit
def affine_pack_kernel(
    codes,
    low,
    high,
    K,
    words,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (N, cdiv(words, TILE)): low and high [N, words] of codes uint8 [N, K]; codes beyond K are 0."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * (2 * TILE) + tl.arange(0, 2 * TILE)
    position = lane // WIDTH * (PLANES * WIDTH) + lane % WIDTH
    half = lane % 2
    word = tl.zeros([2 * TILE], tl.int32)
    upper = tl.zeros([2 * TILE], tl.int32)
    for j in tl.static_range(PLANES):
        k = position + j * WIDTH
        if EVEN:
            code = tl.load(codes + row * K + k, mask=lane < 2 * words, other=0).to(tl.int32)
        else:
            code = tl.load(codes + row * K + k, mask=k < K, other=0).to(tl.int32)
        word |= (code & ((1 << LOW_BITS) - 1)) << (j * LOW_BITS)
        if HIGH_BITS:
            upper |= (code >> LOW_BITS) << (j * HIGH_BITS)
    # The halves hold disjoint bits, so that their sum is their union.
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = at < words
    tl.store(low + row * words + at, tl.sum(tl.reshape(word << (16 * half), [TILE, 2]), 1), mask=inside)
    if HIGH_BITS:
        upper = tl.sum(tl.reshape(upper << (PLANES * HIGH_BITS * half), [TILE, 2]), 1)
        tl.store(high + row * words + at, upper.to(high.dtype.element_ty), mask=inside)


def affine_pack(codes: torch.Tensor, spec: AffineSpec) -> dict[str, torch.Tensor]:
    """The `low` and, where the format has it, `high` words of codes uint8 [N, K], each below 2^bits."""
    rows, in_features = codes.shape
    specs = AFFINE.tensor_specs(spec, rows, in_features)
    packed: dict[str, torch.Tensor] = {
        part: torch.empty(specs[part].shape, dtype=specs[part].dtype, device=codes.device)
        for part in ("low", "high")
        if part in specs
    }
    words = packed["low"].shape[1]
    width, planes = block_width(spec.bits, spec.group_size, in_features), 16 // spec.low_bits
    tile = min(_TILE_WORDS, next_power_of_2(words))
    with on_device(codes):
        affine_pack_kernel[(rows, cdiv(words, tile))](
            codes, packed["low"], packed.get("high", packed["low"]), in_features, words,
            WIDTH=width, PLANES=planes, LOW_BITS=spec.low_bits, HIGH_BITS=spec.high_bits,
            EVEN=in_features % (planes * width) == 0, TILE=tile, num_warps=4,
        )  # fmt: skip
    return packed
