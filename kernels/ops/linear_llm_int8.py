"""`qcompiler::linear_llm_int8`: int8 weights times int8 activations with outlier columns in half precision.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339). Over all tokens of the call, as the bitsandbytes
package computes it, O is the set of columns k with some |x[t, k]| >= threshold:

    s[t]     = max |x[t, k]| over the elements below the threshold
    q[t, k]  = round(x[t, k] · 127 / s[t]), 0 for k in O
    y[t, n]  = scales[n] · (s[t]/127 · Σ q[t, k]·codes[n, k] + Σ_{k in O} x[t, k]·codes[n, k]) + bias[n]

The first sum is over integers; `scales` holds SCB/127 of the package.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.linear_int8 import check_linear_int8

SCHEMA = "linear_llm_int8(Tensor x, Tensor codes, Tensor scales, Tensor? bias, float threshold) -> Tensor"


def quantize_rows(
    x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Row-wise int8 codes of activations, outliers left out.

    Args:
        x: Floating point [tokens, in_features].
        threshold: Magnitude from which an element is an outlier; 0: there are none.

    Returns:
        Codes int8 [tokens, in_features], zero in columns with an outlier; the rows' absmax float32 [tokens]
        over elements below the threshold; the columns with an outlier, bool [in_features], or None.
    """
    values = x.float()
    columns = None
    if threshold > 0 and x.shape[0]:
        outliers = values.abs() >= threshold
        values = values.masked_fill(outliers, 0.0)
        columns = outliers.any(dim=0)
    absmax = values.abs().amax(dim=1) if values.numel() else values.new_zeros(x.shape[0])
    # The factor of an all-zero row must stay finite: its codes are 0, not NaN.
    codes = torch.round(values * (127.0 / absmax.clamp_min(1e-30))[:, None])
    if columns is not None:
        codes = codes.masked_fill(columns, 0.0)
    return codes.to(torch.int8), absmax, columns


def linear_llm_int8_reference(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """The formula at the top, sums in float32, one cast.

    Args:
        x: [..., in_features], any floating dtype.
        codes: int8 [out_features, in_features].
        scales: Floating point [out_features]; the weight is codes · scales.
        bias: [out_features] or None.
        threshold: Magnitude from which an activation's column stays in half precision; 0: none does.

    Returns:
        [..., out_features] in x.dtype.
    """
    check_linear_int8(x, codes, scales, "linear_llm_int8")
    rows = x.reshape(-1, x.shape[-1])
    quantized, absmax, outliers = quantize_rows(rows, threshold)
    weight = codes.float()
    y = (quantized.float() @ weight.T) * (absmax / 127.0)[:, None]
    if outliers is not None:
        columns = outliers.nonzero()[:, 0]
        y = y + rows[:, columns].float() @ weight[:, columns].T
    y = y * scales.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


def linear_llm_int8_fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """Shape and dtype of the result: [..., out_features] in x.dtype."""
    check_linear_int8(x, codes, scales, "linear_llm_int8")
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


LINEAR_LLM_INT8 = register_op(
    SCHEMA,
    reference=linear_llm_int8_reference,
    fake=linear_llm_int8_fake,
    cuda="qcompiler.kernels.triton.linear.llm_int8:linear_llm_int8_triton",
    cpu="qcompiler.kernels.cpu.linear_int8:linear_llm_int8_cpu",
)
