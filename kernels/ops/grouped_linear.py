"""One linear layer per expert over rows sorted by expert (mixture of experts).

    y[r] = x[r] · weight[e]ᵀ + bias[e]      for offsets[e − 1] ≤ r < offsets[e]

Rows from offsets[-1] on belong to no expert and give zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import register_op


def check_shapes(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> int:
    """Output features of `weight`; raises `InvalidInputError` if it does not take x's columns."""
    inputs, outputs = (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
    if x.shape[-1] != inputs:
        raise InvalidInputError(
            f"grouped_linear: rows of {x.shape[-1]} features meet weights of {inputs}",
            hint="Weights are [experts, out, in], or [experts, in, out] with transposed=True.",
        )
    return outputs


def outputs_per_expert(
    op: str, x: torch.Tensor, stored_rows: int, offsets: torch.Tensor, bias: torch.Tensor | None
) -> int:
    """The out_features of one expert, for weights stored as one matrix [experts·out_features, in_features].

    Raises:
        InvalidInputError: x, offsets or bias do not fit that.
    """
    if x.dim() != 2:
        raise InvalidInputError(f"{op}: x is {list(x.shape)}, not rows of features.")
    experts = offsets.shape[0] if offsets.dim() == 1 else 0
    if not experts or stored_rows % experts:
        raise InvalidInputError(
            f"{op}: offsets {list(offsets.shape)} do not divide {stored_rows} stored rows among experts."
        )
    outputs = stored_rows // experts
    if bias is not None and tuple(bias.shape) != (experts, outputs):
        raise InvalidInputError(f"{op}: bias is {list(bias.shape)}, not {[experts, outputs]}.")
    return outputs


def by_expert(
    x: torch.Tensor,
    weight: Callable[[int], torch.Tensor],
    outputs: int,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """What grouped linears over stored weights compute: float32 products and sums, cast to x.dtype once.

    Args:
        x: [rows, in_features], rows sorted by expert.
        weight: Expert → float32 [outputs, in_features]; asked for experts that have rows only.
        outputs: out_features of one expert.
        offsets: int32 [experts], the end of each expert's rows.
        bias: [experts, outputs] or None.
    """
    y = x.new_zeros(x.shape[0], outputs)
    first = 0
    for expert, last in enumerate(offsets.tolist()):
        if last > first:
            part = torch.nn.functional.linear(
                x[first:last].float(), weight(expert), None if bias is None else bias[expert].float()
            )
            y[first:last] = part.to(x.dtype)
        first = last
    return y


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
) -> torch.Tensor:
    outputs = check_shapes(x, weight, transposed)
    parts, first = [], 0  # no writes into slices: calibration takes gradients through this
    for expert, last in enumerate(offsets.clamp(max=x.shape[0]).tolist()):
        if last > first:
            matrix = weight[expert] if transposed else weight[expert].t()
            own = x[first:last]
            parts.append(own @ matrix if bias is None else torch.addmm(bias[expert].to(x.dtype), own, matrix))
            first = last
    return torch.cat([*parts, x.new_zeros(x.shape[0] - first, outputs)])


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], check_shapes(x, weight, transposed)))


grouped_linear = register_op(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, bool transposed=False) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda="qcompiler.kernels.triton.grouped.linear:grouped_linear",
)
