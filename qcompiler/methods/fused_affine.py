"""The affine methods on a GPU: one kernel finds a weight's codes, scales and zeros, another packs them.

The torch path (`AffineMethod.solve`) is the reference and serves CPUs, per-channel weights and a GPU without
Triton. Sums are taken in another order here, so where two lines of a group are as good to within rounding,
either may be kept; on one device the same weight always gives the same bytes.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.kernels.affine_search import Search
from qcompiler.kernels.formats.affine import AffineSpec

if TYPE_CHECKING:
    from qcompiler.kernels.triton.search.column_statistics import ColumnStatistics

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available(weight: Tensor, spec: AffineSpec) -> bool:
    """Whether `quantize` can take this weight."""
    return (
        weight.is_cuda
        and spec.group_size > 0
        and weight.dtype in _DTYPES
        and importlib.util.find_spec("triton") is not None
    )


def columns(weight: Tensor, factor: float, limit: float) -> ColumnStatistics:
    """See `column_statistics`."""
    from qcompiler.kernels.triton.search.column_statistics import column_statistics

    return column_statistics(weight, factor, limit)


def quantize(
    weight: Tensor,
    spec: AffineSpec,
    search: Search | None = None,
    inverses: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The affine format's tensors of a weight; of one that `check_weight` refuses, anything."""
    from qcompiler.kernels.triton.search.affine_pack import affine_pack
    from qcompiler.kernels.triton.search.affine_search import affine_search

    codes, scales, zeros = affine_search(weight.contiguous(), spec, search, inverses)
    return {**affine_pack(codes, spec), "scales": scales, "zeros": zeros}
