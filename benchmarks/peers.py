"""Other people's quantized linears on the same shapes, where their packages are installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Peer:
    """Somebody's kernel: `make(n, k, case)` gives one with random weights of its own.

    Attributes:
        make: Makes a call of x [M, K].
        cases: Ours that it stands beside.
        package: Where it comes from.
    """

    make: Callable[[int, int, str], Call]
    cases: tuple[str, ...]
    package: str = "torch"


def tinygemm(n: int, k: int, _case: str) -> Call:
    """The 4-bit matmul of torch itself, groups of 64."""
    packed = torch.ops.aten._convert_weight_to_int4pack(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8
    )
    sides = torch.randn(k // 64, n, 2, device="cuda").to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, sides)


def gemlite(n: int, k: int, case: str) -> Call:
    """The linear of gemlite in as many bits, groups of 64, with its own configurations for the H100."""
    import gemlite as package
    from gemlite.helper import A16Wn

    configs = Path(package.__file__).parent / "configs" / "h100.json"
    if configs.is_file():
        with contextlib.redirect_stdout(None):
            package.load_config(str(configs))
    bits = int(case[1])
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n * k // 64, 1, device="cuda", dtype=torch.bfloat16)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    layer = A16Wn(dtype=torch.bfloat16).from_weights(codes, scales, zeros, bits, 64)
    return lambda x: layer(x)


def bitsandbytes_nf4(n: int, k: int, _case: str) -> Call:
    """NF4 of bitsandbytes, blocks of 64."""
    import bitsandbytes
    from bitsandbytes import functional

    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


def bitsandbytes_int8(n: int, k: int, _case: str) -> Call:
    """Int8 of bitsandbytes without outliers: finding them waits for the GPU, which no CUDA graph can."""
    from bitsandbytes import functional

    weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
    codes, absmax, _ = functional.int8_vectorwise_quant(weight)

    def call(x: torch.Tensor) -> torch.Tensor:
        rows, row_absmax, _ = functional.int8_vectorwise_quant(x.half())
        return functional.int8_scaled_mm(rows, codes, row_absmax, absmax, dtype=torch.bfloat16)

    return call


def aqlm_triton(n: int, k: int, case: str) -> Call:
    """The Triton kernel of the aqlm package; its CUDA kernels are compiled at first use, where nvcc is."""
    from aqlm.inference_kernels.triton_kernel import triton_matmul

    books, bits = map(int, case.removeprefix("aqlm-").split("x"))
    dtype = torch.int8 if bits == 8 else torch.int16
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k // 8, books), dtype=dtype, device="cuda")
    codebooks = torch.randn(books, 2**bits, 1, 8, device="cuda", dtype=torch.bfloat16)
    scales = torch.rand(n, 1, 1, 1, device="cuda", dtype=torch.bfloat16)
    return lambda x: triton_matmul(x, codes, codebooks, scales, None)


_ALL = {
    "tinygemm": Peer(tinygemm, ("b4-g64",)),
    "gemlite": Peer(gemlite, ("b2-g64", "b4-g64", "b8-g64"), "gemlite"),
    "bitsandbytes_nf4": Peer(bitsandbytes_nf4, ("b4-g64", "nf4"), "bitsandbytes"),
    "bitsandbytes_int8": Peer(bitsandbytes_int8, ("llm-int8",), "bitsandbytes"),
    "aqlm_triton": Peer(aqlm_triton, ("aqlm-1x16", "aqlm-2x8"), "aqlm"),
}
PEERS = {name: peer for name, peer in _ALL.items() if importlib.util.find_spec(peer.package) is not None}
