"""One linear layer per expert over rows sorted by expert (mixture of experts).

    y[r] = x[r] · weight[e]ᵀ + bias[e]      for offsets[e − 1] ≤ r < offsets[e]

Rows from offsets[-1] on belong to no expert and give zeros.
"""

from __future__ import annotations

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


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool = False,
) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], check_shapes(x, weight, transposed))
    first = 0
    for expert, last in enumerate(offsets.tolist()):
        if last > first:
            matrix = weight[expert] if transposed else weight[expert].t()
            # Assigned, not written by `out=`: calibration takes gradients through this.
            if bias is None:
                out[first:last] = torch.mm(x[first:last], matrix)
            else:
                out[first:last] = torch.addmm(bias[expert].to(x.dtype), x[first:last], matrix)
        first = last
    return out


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
    cuda="qcompiler.kernels.triton.grouped_linear:grouped_linear",
)
