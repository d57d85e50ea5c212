"""CPU providers of the int8 linears from torch's own integer kernels."""

from __future__ import annotations

import torch

from qcompiler.kernels.ops.linear_int8 import check_linear_int8, linear_int8_reference
from qcompiler.kernels.ops.linear_llm_int8 import linear_llm_int8_reference, quantize_rows

# `_weight_int8pack_mm` reads the weight once per token; from here on one conversion to float32 is cheaper.
_MAX_PACKED_TOKENS = 8
# It loads aligned vectors, of 16 codes and 32 bytes of activations, and faults on other widths and addresses.
_PACKED_WIDTH = 16
_ALIGNMENT = 64
# Without AVX-512 `_int_mm` is a scalar loop, slower than a float32 product.
_HAS_INT_MM = torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear_int8_cpu(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`linear_int8`; for a few bfloat16 tokens torch's `_weight_int8pack_mm`, else the reference.

    The packed product gets unit scales: it would round them to bfloat16, which biases a whole channel.
    """
    check_linear_int8(x, codes, scales)
    tokens = x.numel() // x.shape[-1]
    fits = x.dtype == torch.bfloat16 and x.shape[-1] % _PACKED_WIDTH == 0 and codes.is_contiguous()
    if not fits or not 0 < tokens <= _MAX_PACKED_TOKENS:
        return linear_int8_reference(x, codes, scales, bias)
    rows = _aligned(x.reshape(tokens, -1).contiguous())
    codes = _aligned(codes)
    ones = torch.ones(codes.shape[0], dtype=torch.bfloat16)
    y = torch.ops.aten._weight_int8pack_mm(rows, codes, ones).float() * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or where its memory begins anywhere (mapped from a file) a copy that torch aligned."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def linear_llm_int8_cpu(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """`linear_llm_int8` with exact integer sums (`_int_mm`) where that is fast, else the reference."""
    if not _HAS_INT_MM or not x.numel() or not codes.is_contiguous():
        return linear_llm_int8_reference(x, codes, scales, bias, threshold)
    check_linear_int8(x, codes, scales, "linear_llm_int8")
    rows = x.reshape(-1, x.shape[-1])
    quantized, absmax, outliers = quantize_rows(rows, threshold)
    y = torch.ops.aten._int_mm(quantized, codes.t()).float() * (absmax / 127.0)[:, None]
    if outliers is not None:
        columns = outliers.nonzero()[:, 0]
        y = y + rows[:, columns].float() @ codes[:, columns].float().T
    y = y * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])
