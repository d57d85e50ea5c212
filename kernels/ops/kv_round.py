"""What a quantized KV cache gives back of keys or values: quantized and dequantized at once.

Attention over `kv_round(k)` and `kv_round(v)` is attention over a cache of that
format; it is how quality is measured without one.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.formats.kv_cache import kv_format
from qcompiler.kernels.library import register_op


def _reference(x: torch.Tensor, format: str) -> torch.Tensor:
    chosen = kv_format(format)
    return chosen.dequantize(*chosen.quantize(x), x.shape[-1]).to(x.dtype)


def _fake(x: torch.Tensor, format: str) -> torch.Tensor:
    kv_format(format)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


kv_round = register_op("kv_round(Tensor x, str format) -> Tensor", reference=_reference, fake=_fake)
