"""`qcompiler::grouped_linear_int8`: one weight-only int8 linear per expert, one scale per channel.

    y[r] = x[r] · (codes[e] · scales[e])ᵀ + bias[e]      for offsets[e − 1] ≤ r < offsets[e]

The weights [experts, out_features, in_features] are stored as one int8_channel matrix
[experts·out_features, in_features]: expert e owns the rows from e·out_features on. Rows of x from
offsets[-1] on belong to no expert and give zeros.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.grouped_linear import by_expert, outputs_per_expert
from qcompiler.kernels.ops.linear_int8 import check_linear_int8

SCHEMA = "grouped_linear_int8(Tensor x, Tensor codes, Tensor scales, Tensor offsets, Tensor? bias) -> Tensor"


def check_grouped_linear_int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> int:
    """Refuse arguments whose shapes do not fit together; gives the out_features of one expert.

    Raises:
        InvalidInputError: Names the argument.
    """
    op = "grouped_linear_int8"
    check_linear_int8(x, codes, scales, op)
    return outputs_per_expert(op, x, codes.shape[0], offsets, bias)


def grouped_linear_int8_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Dequantize the experts that have rows to float32, one at a time; float32 sums, cast once.

    Args:
        x: [rows, in_features], rows sorted by expert, any floating dtype.
        codes: int8 [experts·out_features, in_features].
        scales: Floating point [experts·out_features].
        offsets: int32 [experts], the end of each expert's rows.
        bias: [experts, out_features] or None.

    Returns:
        [rows, out_features] in x.dtype.
    """
    outputs = check_grouped_linear_int8(x, codes, scales, offsets, bias)

    def weight(expert: int) -> torch.Tensor:
        own = slice(expert * outputs, (expert + 1) * outputs)
        return codes[own].float() * scales[own].float()[:, None]

    return by_expert(x, weight, outputs, offsets, bias)


def grouped_linear_int8_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Shape and dtype of the result: [rows, out_features] in x.dtype."""
    return x.new_empty((x.shape[0], check_grouped_linear_int8(x, codes, scales, offsets, bias)))


GROUPED_LINEAR_INT8 = register_op(
    SCHEMA,
    reference=grouped_linear_int8_reference,
    fake=grouped_linear_int8_fake,
    cuda="qcompiler.kernels.triton.grouped.int8:grouped_linear_int8_triton",
)
