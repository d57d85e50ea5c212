"""Launches the Triton kernels of `qcompiler::linear_body_tail`; the reference's result up to rounding.

Body and tail are one launch: the GEMM on tensor cores, or the GEMV on the float32 units for a few tokens
of float32, whose bits tensor cores would drop. Beyond 512 tokens both become a dense weight for a library
matmul. For the GEMM a small kernel lays x out once. Nothing waits for the device and every buffer's
size follows from the shapes. Split-K parts are summed by another kernel in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from qcompiler.kernels.formats.affine import PLANES, block_width, num_groups
from qcompiler.kernels.formats.body_tail import BodyTailSpec, tail_layout
from qcompiler.kernels.ops.linear_body_tail import check_linear_body_tail
from qcompiler.kernels.triton.launch import cdiv, half_of, on_device, token_rows
from qcompiler.kernels.triton.linear.affine import dequantize_triton
from qcompiler.kernels.triton.linear.body_tail_gemm import linear_body_tail_gemm
from qcompiler.kernels.triton.linear.body_tail_gemv import linear_body_tail_gemv
from qcompiler.kernels.triton.linear.body_tail_slots import add_tail_kernel, prepare_x_kernel
from qcompiler.kernels.triton.linear.launch import measured_config, multiprocessors, split_target, sum_split
from qcompiler.kernels.triton.linear.x_pairs import as_pairs
from qcompiler.kernels.tuning.tables import LinearConfig, token_bucket

COMPILED = not isinstance(linear_body_tail_gemm, InterpretedFunction)
_STEP_BLOCKS = 8  # blocks of the body, mostly of 256 codes, that a GEMV program works on together
_ROWS = 16  # rows whose words a GEMV program loads together; it takes block_n of them in turn
_TAIL_SLOTS = 16  # slots that a GEMV program reads together
_GATHERED = 64  # values of x that a thread of the GEMM gathers together, from at most so many slots:
_GEMM_SLOTS = 4


def linear_body_tail_triton(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tail_fraction: float,
    tail_bits: int,
    in_features: int,
    config: LinearConfig | None = None,
) -> torch.Tensor:
    """`linear_body_tail` (see `ops/linear_body_tail.py`) by Triton; `config` overrides the choice."""
    spec = BodyTailSpec(bits, group_size, tail_fraction, tail_bits)
    check_linear_body_tail(x, low, high, scales, tail, tail_scales, spec, in_features)
    with on_device(x):
        return _launch(x, (low, high, scales, zeros), tail, tail_scales, bias, spec, in_features, config)


def _launch(
    x: torch.Tensor,
    body: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor],
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    bias: torch.Tensor | None,
    spec: BodyTailSpec,
    in_features: int,
    config: LinearConfig | None,
) -> torch.Tensor:
    out_features = body[0].shape[0]
    rows = token_rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    if config is None:
        key = f"linear_body_tail/affine-b{spec.bits}-g{spec.group_size}"
        dtype = str(x.dtype).removeprefix("torch.")
        config = measured_config(key, rows, out_features) or heuristic(
            out_features, in_features, tokens, dtype, multiprocessors(x.device)
        )
    if config.kind == "dense":
        weight = dequantize_body_tail_triton(*body, tail, tail_scales, spec, in_features, x.dtype)
        y = torch.nn.functional.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        y = _fused(rows, *body, tail, tail_scales, bias, spec, config)
    return y.view(*x.shape[:-1], out_features)


def heuristic(n: int, k: int, tokens: int, dtype: str, sms: int) -> LinearConfig:
    """A sane configuration where nothing was measured.

    Tensor cores from one token on: their loop takes 3.8 to 5 instructions per weight of 3 bits, the GEMV's
    6 (counted in SASS). float32 activations never use them: few take the GEMV.
    """
    if dtype == "float32":
        return LinearConfig("gemv", 16, 1, 1, 8, 2) if tokens <= 4 else LinearConfig("dense")
    if tokens > 512:
        return LinearConfig("dense")
    if tokens > 64:
        block_n, block_m, warps, stages = 128, 128, 8, 2
    else:
        block_n, block_m, warps, stages = 128 if n >= 128 * sms else 64, max(8, token_bucket(tokens)), 4, 3
    programs = -(-n // block_n) * -(-tokens // block_m)
    split = max(1, min(2 * sms // programs, k // 1024, 8))
    return LinearConfig("gemm", block_n, block_m, split, warps, stages)


def _fused(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    bias: torch.Tensor | None,
    spec: BodyTailSpec,
    config: LinearConfig,
) -> torch.Tensor:
    tokens, in_features = x.shape
    out_features, words = low.shape
    width = block_width(spec.bits, spec.group_size, in_features)
    planes = PLANES[spec.bits]
    gemv = config.kind == "gemv"
    if gemv:
        blocks = 2 * words // width
        together = min(_STEP_BLOCKS, triton.next_power_of_2(blocks))
        tile = planes * width * together
    else:
        tile = planes * max(width, 16)
    steps = cdiv(in_features, tile)
    steps_per_split = cdiv(steps, config.split_k)
    split = cdiv(steps, steps_per_split)
    out, target = split_target(x, out_features, split)
    _, slots, columns = tail_layout(spec, in_features)
    stored = (
        low,
        high if high is not None else low,
        scales,
        zeros,
        tail,
        tail_scales,
        bias if bias is not None else scales,
        target,
        tokens,
        out_features,
        in_features,
        num_groups(spec.group_size, in_features),
        words,
        tail.shape[0],
    )
    shares = (steps_per_split, cdiv(tail.shape[0], split))
    constants = {
        "BITS": spec.bits,
        "GROUP": spec.group_size,
        "WIDTH": width,
        "SLOTS": slots,
        "COLUMNS": columns,
        "TAIL_BITS": spec.tail_bits,
        "BN": config.block_n,
        "SPLIT": split,
        "HAS_BIAS": bias is not None and split == 1,
        "HALF": half_of(x.dtype),
        "COMPILED": COMPILED,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if gemv:
        pairs = as_pairs(x)
        linear_body_tail_gemv[(cdiv(out_features, config.block_n), split, tokens)](
            x,
            x if pairs is None else pairs,
            *stored,
            x.stride(0),
            *shares,
            KB=together,
            ROWS=min(_ROWS, config.block_n),
            TS=min(_TAIL_SLOTS, triton.next_power_of_2(shares[1])),
            PAIRS=pairs is not None,
            EVEN=in_features % tile == 0,
            **constants,
        )
    else:
        groups = num_groups(spec.group_size, in_features)
        xt = x.new_empty((in_features, -(-tokens // config.block_m) * config.block_m))
        x_sums = x.new_empty((groups, xt.shape[1]), dtype=torch.float32)
        together = min(16, config.block_m)
        prepare_x_kernel[(groups, xt.shape[1] // together)](
            x,
            xt,
            x_sums,
            tokens,
            in_features,
            x.stride(0),
            xt.stride(0),
            spec.group_size or in_features,
            BM=together,
            BK=64,
        )
        together = _GATHERED * 32 * config.num_warps // (config.block_n * config.block_m)
        grid = (cdiv(out_features, config.block_n) * cdiv(tokens, config.block_m), split)
        linear_body_tail_gemm[grid](
            x,
            xt,
            x_sums,
            *stored,
            x.stride(0),
            xt.stride(0),
            *shares,
            BM=config.block_m,
            EVEN_K=in_features % tile == 0,
            TS=max(1, min(_GEMM_SLOTS, together, triton.next_power_of_2(shares[1]))),
            **constants,
        )
    return sum_split(target, bias, out)


def dequantize_body_tail_triton(
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    spec: BodyTailSpec,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight [out_features, in_features] in `dtype`; a tail weight is rounded twice."""
    weight = dequantize_triton(low, high, scales, zeros, spec.bits, spec.group_size, in_features, dtype)
    _, slots, columns = tail_layout(spec, in_features)
    grid = (cdiv(low.shape[0], 64), cdiv(tail.shape[0], 8))
    add_tail_kernel[grid](
        weight,
        tail,
        tail_scales,
        low.shape[0],
        in_features,
        tail.shape[0],
        SLOTS=slots,
        COLUMNS=columns,
        TAIL_BITS=spec.tail_bits,
        BN=64,
        TS=8,
        num_warps=4,
    )
    return weight
