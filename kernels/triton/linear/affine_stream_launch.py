"""Launches `linear_affine_stream`: which tensors it takes, its rings, programs and parts of tiles."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from qcompiler.kernels.triton.launch import cdiv, half_of
from qcompiler.kernels.triton.linear.launch import device_facts
from qcompiler.kernels.tuning.tables import LinearConfig

_SHARED = 224 * 1024  # bytes of shared memory that the rings of one multiprocessor share
_BLOCK = 256  # codes of a row that a step takes
_WIDTHS = {2: 32, 3: 32, 4: 64}  # codes per plane of such a block
_MOST_TOKENS = 65536  # so that numbers of steps times programs stay below 2^31
MOST_BLOCK_M = 128  # tokens of a tile; with 256 the kernel failed its test on an H100
# Gluon is experimental: what the kernel is written in is that of this version.
_KNOWN_GLUON = triton.__version__.startswith("3.6.")
BURST = 1  # blocks of words that are asked for together
EARLY = True  # launch before the kernel before has ended, and wait for it on the GPU


def stream_takes(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bits: int,
    group_size: int,
    width: int,
) -> bool:
    """Whether the kernel can run: Hopper, whole groups in a block, and rows that the copy engine can read."""
    if _WIDTHS.get(bits) != width or group_size not in (64, 128, 256) or x.device.type != "cuda":
        return False
    if not _KNOWN_GLUON or not _is_hopper(x.device) or x.shape[0] > _MOST_TOKENS:
        return False
    read = [t for t in (x, low, high, sides) if t is not None]
    return all(
        t.data_ptr() % 16 == 0 and t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 for t in read
    )


@lru_cache(maxsize=16)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def linear_stream(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    sides: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    config: LinearConfig,
    rings: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """The product [M, N] of x [M, K] by `linear_affine_stream`; for what `stream_takes`.

    split_k 1 gives every program whole tiles; more divides a tile between up to so many.
    """
    from qcompiler.kernels.triton.linear.affine_stream import linear_affine_stream

    tokens, in_features = x.shape
    out_features = low.shape[0]
    bn, bm, warps = config.block_n, config.block_m, config.num_warps
    per_sm = 2 if warps == 4 else 1
    width = _WIDTHS[bits]
    ws, xs, xp = rings or ring_sizes(bits, bn, bm, config.num_stages, per_sm)
    tiles_m = cdiv(tokens, bm)
    tiles = tiles_m * cdiv(out_features, bn)
    blocks = cdiv(in_features, _BLOCK)
    _, sms = device_facts(x.device)
    programs = min(sms * per_sm, tiles * min(config.split_k, blocks))
    unit = blocks if config.split_k == 1 else 1
    divided = unit == 1 and tiles % programs != 0
    out = x.new_empty((tokens, out_features))
    parts = x.new_empty((2 * programs, bm, bn) if divided else (1,), dtype=torch.float32)
    linear_affine_stream[(programs,)](
        _descriptor(x, bm, width),
        _descriptor(low, bn, width // 2),
        _descriptor(high, bn, width // 2) if high is not None else None,
        _descriptor(sides, bn, 4),
        out,
        parts,
        bias if bias is not None else x,
        tokens,
        out_features,
        tiles_m,
        tiles,
        blocks,
        unit,
        BITS=bits,
        SIDES=_BLOCK // group_size,
        BN=bn,
        BM=bm,
        WS=ws,
        XS=xs,
        XP=xp,
        BURST=min(BURST, ws),
        HAS_BIAS=bias is not None,
        HALF=half_of(x.dtype),
        num_warps=warps,
        maxnreg=registers(warps),
        launch_pdl=EARLY,
    )
    if divided:
        rows = min(bm, max(1, 4096 // bn))
        sum_parts[(tiles, bm // rows)](
            parts,
            out,
            bias if bias is not None else x,
            tokens,
            out_features,
            tiles_m,
            tiles,
            blocks,
            programs,
            BN=bn,
            BM=bm,
            BLOCK_M=rows,
            HAS_BIAS=bias is not None,
            PDL=EARLY,
            num_warps=4,
            launch_pdl=EARLY,
        )
    return out


def registers(warps: int) -> int:
    """Registers per thread: those of a multiprocessor over its programs, each with four warps that copy."""
    return 168 if warps == 8 else 128


@lru_cache(maxsize=256)
def ring_sizes(
    bits: int, block_n: int, block_m: int, word_buffers: int, per_sm: int = 1
) -> tuple[int, int, int]:
    """Buffers of words, buffers of x, and planes of x per buffer: a block's for few tokens, else 64 codes."""
    width = _WIDTHS[bits]
    planes = (_BLOCK if block_m <= 64 else 64) // width
    words = width // 2 * (6 if bits == 3 else 4) + 4 * 4  # bytes of a row's block with its sides
    left = _SHARED // per_sm - word_buffers * block_n * words
    most = word_buffers * _BLOCK // (planes * width)
    return word_buffers, max(2, min(most, left // (planes * block_m * width * 2))), planes


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = _layout(rows, columns, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


@lru_cache(maxsize=256)
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = getattr(gl, str(dtype).removeprefix("torch."))
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles", "blocks", "programs"])
def sum_parts(
    parts,
    out,
    bias,
    M,
    N,
    tiles_m,
    tiles,
    blocks,
    programs,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles, BM / BLOCK_M): out [M, N] where several programs worked on a tile, arguments as theirs."""
    tile = tl.program_id(0)
    steps = tiles * blocks
    owner = ((tile * blocks + 1) * programs - 1) // steps
    final = ((tile + 1) * blocks * programs - 1) // steps
    if PDL:
        cuda.gdc_wait()
    if owner < final:
        n = tl.arange(0, BN)
        m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        at = parts + m[:, None] * BN + n[None, :]
        y = tl.load(at + (2 * owner + 1) * (BN * BM))
        while owner < final:
            owner += 1
            y += tl.load(at + 2 * owner * (BN * BM))
        n += tile // tiles_m * BN
        m += tile % tiles_m * BM
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        mask = (m[:, None] < M) & (n[None, :] < N)
        tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=mask)
