"""What the launchers of the linears share: facts of the device, the choice of a kernel, split-K sums."""

from __future__ import annotations

from functools import lru_cache

import torch

from qcompiler.kernels.triton.launch import cdiv, early_start
from qcompiler.kernels.triton.linear.affine_gemv import sum_partials
from qcompiler.kernels.tuning.tables import LinearConfig, linear_config, load_table, token_bucket

_SUM_BLOCK = 512


def measured_config(weight_key: str, x: torch.Tensor, out_features: int) -> LinearConfig | None:
    """The tuning table's entry, or None where nothing was measured; arguments as for `choose_config`."""
    gpu, _ = device_facts(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    return _measured(weight_key, gpu, out_features, x.shape[1], token_bucket(x.shape[0]), dtype)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few where there are none."""
    return device_facts(device)[1]


def choose_config(weight_key: str, x: torch.Tensor, out_features: int) -> LinearConfig:
    """The tuning table's entry for this op, format, shape and number of tokens, or a sane one.

    Args:
        weight_key: Op and format, e.g. "linear_lut4/nf4-b64".
        x: Activations [tokens, in_features].
        out_features: N.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    gpu, sms = device_facts(x.device)
    return _choose(weight_key, gpu, sms, out_features, x.shape[1], token_bucket(x.shape[0]), dtype)


def affine_config(x: torch.Tensor, bits: int, group_size: int, out_features: int) -> LinearConfig:
    """`choose_config` for affine codes, whose roads are more and have a heuristic of their own."""
    gpu, sms = device_facts(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    return linear_config(
        gpu, sms, bits, group_size, out_features, x.shape[1], token_bucket(x.shape[0]), dtype
    )


@lru_cache(maxsize=4096)
def _choose(weight_key: str, gpu: str, sms: int, n: int, k: int, bucket: int, dtype: str) -> LinearConfig:
    return _measured(weight_key, gpu, n, k, bucket, dtype) or heuristic(n, k, bucket, dtype, sms)


@lru_cache(maxsize=4096)
def _measured(weight_key: str, gpu: str, n: int, k: int, bucket: int, dtype: str) -> LinearConfig | None:
    key = f"{weight_key}/n{n}-k{k}/m{bucket}/{dtype}"
    return load_table(gpu).get(key) if gpu else None


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


def split_target(
    x: torch.Tensor,
    out_features: int,
    split: int,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [M, N] for x [M, K], and where a kernel writes: itself, or float32 parts [split, M, N].

    `dtype` is the result's, x's own by default; with an activation (see `sum_split`) it is [M, N/2].
    """
    tokens, columns = x.shape[0], out_features // 2 if activation is not None else out_features
    out = x.new_empty((tokens, columns), dtype=dtype or x.dtype)
    return out, out if split == 1 else x.new_empty((split, tokens, out_features), dtype=torch.float32)


def sum_split(
    partials: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, activation: str | None = None
) -> torch.Tensor:
    """Sum partials [split, M, N] into out [M, N], always in the same order, plus bias [N]; gives `out`.

    Where nothing was split (see `split_target`) they are one tensor, complete with its bias. With an
    activation ("silu", "gelu", "gelu_tanh") out [M, N/2] is that of the first half of the columns, times the
    second half.
    """
    if partials is out:
        return out
    split, tokens, columns = partials.shape
    sum_partials[(cdiv(out.numel(), _SUM_BLOCK),)](
        partials,
        bias if bias is not None else partials,
        out,
        tokens * columns,
        columns,
        SPLIT=split,
        HAS_BIAS=bias is not None,
        BLOCK=_SUM_BLOCK,
        ACTIVATION=activation,
        **early_start(out.device),
    )
    return out


@lru_cache(maxsize=16)
def device_facts(device: torch.device) -> tuple[str, int]:
    """Name and streaming multiprocessors of a GPU; no name and a few where there is none."""
    if device.type != "cuda":
        return "", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
