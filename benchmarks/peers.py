"""Other people's quantized linears on the same shapes, where their packages are installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[torch.Tensor], Any]


def tinygemm(n: int, k: int) -> Call:
    """The 4-bit matmul of torch itself, groups of 64."""
    packed = torch.ops.aten._convert_weight_to_int4pack(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8
    )
    sides = torch.randn(k // 64, n, 2, device="cuda").to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, sides)


def gemlite(n: int, k: int) -> Call:
    """The 4-bit linear of gemlite, with its own configurations for the H100."""
    import gemlite as package
    from gemlite.helper import A16Wn

    configs = Path(package.__file__).parent / "configs" / "h100.json"
    if configs.is_file():
        with contextlib.redirect_stdout(None):
            package.load_config(str(configs))
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n * k // 64, 1, device="cuda", dtype=torch.bfloat16)
    zeros = torch.full_like(scales, 8)
    layer = A16Wn(dtype=torch.bfloat16).from_weights(codes, scales, zeros, 4, 64)
    return lambda x: layer(x)


def bitsandbytes_nf4(n: int, k: int) -> Call:
    """NF4 of bitsandbytes, blocks of 64."""
    import bitsandbytes
    from bitsandbytes import functional

    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


PEERS: dict[str, Callable[[int, int], Call]] = {"tinygemm": tinygemm}
for _name, _maker in (("gemlite", gemlite), ("bitsandbytes", bitsandbytes_nf4)):
    if importlib.util.find_spec(_name) is not None:
        PEERS[f"{_name}_nf4" if _name == "bitsandbytes" else _name] = _maker
