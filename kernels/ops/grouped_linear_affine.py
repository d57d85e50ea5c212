"""`qcompiler::grouped_linear_affine`: one linear per expert, all weights in one affine tensor set.

    y[r] = x[r] · W[e]ᵀ + bias[e]      for offsets[e − 1] ≤ r < offsets[e]

The weights [experts, out_features, in_features] are stored as one affine matrix
[experts·out_features, in_features] (`formats/affine.py`): expert e owns the rows
from e·out_features on. Rows of x from offsets[-1] on belong to no expert and
give zeros.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import dequantize_affine
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.grouped_linear import by_expert, outputs_per_expert
from qcompiler.kernels.ops.linear_affine import check_affine_tensors

SCHEMA = (
    "grouped_linear_affine(Tensor x, Tensor low, Tensor? high, Tensor scales, Tensor zeros, Tensor offsets, "
    "Tensor? bias, int bits, int group_size, int in_features) -> Tensor"
)


def check_grouped_linear_affine(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> int:
    """Refuse arguments whose shapes do not fit together; gives the out_features of one expert.

    Raises:
        InvalidInputError: Names the argument.
    """
    op = "grouped_linear_affine"
    if x.dim() != 2 or x.shape[1] != in_features:
        raise InvalidInputError(f"{op}: x is {list(x.shape)}, not rows of {in_features} features.")
    check_affine_tensors(op, low, high, scales, bits, group_size, in_features)
    if zeros.shape != scales.shape:
        raise InvalidInputError(f"{op}: zeros are {list(zeros.shape)}, scales {list(scales.shape)}.")
    return outputs_per_expert(op, x, low.shape[0], offsets, bias)


def grouped_linear_affine_reference(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize the experts that have rows to float32, one at a time; float32 sums, cast once.

    Args:
        x: [rows, in_features], rows sorted by expert, any floating dtype.
        low: int32 [experts·out_features, words].
        high: int16 or uint8 [experts·out_features, words] for 3, 5 and 6 bits, else None.
        scales: [groups, experts·out_features].
        zeros: [groups, experts·out_features].
        offsets: int32 [experts], the end of each expert's rows.
        bias: [experts, out_features] or None.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64, 128, 256, or 0 for one group per output channel.
        in_features: K.

    Returns:
        [rows, out_features] in x.dtype.
    """
    outputs = check_grouped_linear_affine(
        x, low, high, scales, zeros, offsets, bias, bits, group_size, in_features
    )

    def weight(expert: int) -> torch.Tensor:
        own = slice(expert * outputs, (expert + 1) * outputs)
        return dequantize_affine(
            low[own], None if high is None else high[own], scales[:, own], zeros[:, own],
            bits, group_size, in_features,
        )  # fmt: skip

    return by_expert(x, weight, outputs, offsets, bias)


def grouped_linear_affine_fake(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [rows, out_features] in x.dtype."""
    outputs = check_grouped_linear_affine(
        x, low, high, scales, zeros, offsets, bias, bits, group_size, in_features
    )
    return x.new_empty((x.shape[0], outputs))


GROUPED_LINEAR_AFFINE = register_op(
    SCHEMA,
    reference=grouped_linear_affine_reference,
    fake=grouped_linear_affine_fake,
    cuda="qcompiler.kernels.triton.grouped.affine:grouped_linear_affine_triton",
)
