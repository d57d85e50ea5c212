"""What the launchers of lut4 and int8 linears share: the choice of a kernel, and the split-K sum."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from qcompiler.kernels.triton.linear_affine_gemv import sum_partials
from qcompiler.kernels.tuning.tables import LinearConfig, load_table, token_bucket

_SUM_BLOCK = 512


def measured_config(weight_key: str, x: torch.Tensor, out_features: int) -> LinearConfig | None:
    """The tuning table's entry, or None where nothing was measured; arguments as for `choose_config`."""
    gpu, _ = _device(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    key = f"{weight_key}/n{out_features}-k{x.shape[1]}/m{token_bucket(x.shape[0])}/{dtype}"
    return load_table(gpu).get(key) if gpu else None


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few where there are none."""
    return _device(device)[1]


def choose_config(weight_key: str, x: torch.Tensor, out_features: int) -> LinearConfig:
    """The tuning table's entry for this op, format, shape and number of tokens, or a sane one.

    Args:
        weight_key: Op and format, e.g. "linear_lut4/nf4-b64".
        x: Activations [tokens, in_features].
        out_features: N.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    gpu, sms = _device(x.device)
    return _choose(weight_key, gpu, sms, out_features, x.shape[1], token_bucket(x.shape[0]), dtype)


@lru_cache(maxsize=4096)
def _choose(weight_key: str, gpu: str, sms: int, n: int, k: int, bucket: int, dtype: str) -> LinearConfig:
    key = f"{weight_key}/n{n}-k{k}/m{bucket}/{dtype}"
    entry = load_table(gpu).get(key) if gpu else None
    return entry or heuristic(n, k, bucket, dtype, sms)


def heuristic(n: int, k: int, tokens: int, dtype: str, sms: int) -> LinearConfig:
    """A sane configuration where nothing was measured.

    One or two tokens run on the float32 units, up to 512 on tensor cores with the weight decoded in
    registers; beyond that it would be decoded too often, so it is written out once. float32
    activations never use tensor cores, which would round them.
    """
    if tokens <= 2:
        programs = -(-n // 16) * tokens
        return LinearConfig("gemv", 16, 1, max(1, min(8 * sms // programs, k // 2048, 8)), 4, 3)
    if dtype == "float32" or tokens > 512:
        return LinearConfig("dense")
    if tokens <= 64:
        block_n, block_m, warps, stages = 64, max(16, tokens), 4, 3
    else:
        block_n, block_m, warps, stages = 128, 128, 8, 2
    programs = -(-n // block_n) * -(-tokens // block_m)
    split = max(1, min(2 * sms // programs, k // 1024, 8))
    return LinearConfig("gemm", block_n, block_m, split, warps, stages)


def sum_split(partials: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sum partials [split, M, N] into out [M, N], always in the same order, plus bias [N]."""
    count = out.numel()
    sum_partials[(triton.cdiv(count, _SUM_BLOCK),)](
        partials,
        bias if bias is not None else partials,
        out,
        count,
        out.shape[1],
        SPLIT=partials.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=_SUM_BLOCK,
    )


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
