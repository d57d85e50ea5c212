"""GPTQ: round column by column, later columns make up for the error of earlier ones (Frantar et al. 2022).

With H the damped Gram matrix of the input and H⁻¹ = UᵀU, the error e of column j is spread over the columns
behind it as −e/U_jj·U_j,rest. Columns go in the order of falling H_jj (act-order), but every column keeps the
scale and zero point of its group in the weight's own order, fixed before the first is rounded: the stored
format is plain `affine` and no gather is needed at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from qcompiler.calibration.task import BlockResult, BlockTask, Moments
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, BITS, AffineSpec
from qcompiler.methods.base import MethodOption
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.methods.hqq import HQQ
from qcompiler.methods.integer_zeros import OPTION as ZEROS
from qcompiler.methods.integer_zeros import integer_groups

_LAZY_COLUMNS = 128


class GPTQ(CalibratedMethod):
    """Rounding with error feedback on calibration text; where there is none, hqq's search."""

    name = "gptq"
    summary = "column by column with error feedback on calibration text, in the plain affine format"
    format_name: ClassVar[str] = AFFINE.name
    bits: ClassVar[tuple[int, ...]] = BITS
    options: ClassVar[Mapping[str, MethodOption]] = {
        "damping": MethodOption(0.01, help="share of the mean diagonal added to XXᵀ"),
        "zeros": ZEROS,
    }

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> AffineSpec:
        """See `Method.resolve_spec`."""
        self.check_bits(bits)
        return AffineSpec(bits, self.default_group_size if group_size is None else group_size)

    def quantize(
        self,
        weight: torch.Tensor,
        spec: AffineSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
    ) -> dict[str, torch.Tensor]:
        """See `Method.quantize`: without inputs there is no error to feed back, so this is hqq's search."""
        zeros = self.validate(options)["zeros"]
        return HQQ().quantize(weight, spec, {"zeros": zeros}, name=name)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """See `CalibratedMethod.quantize_block`; norms and biases stay as they are."""
        options = self.validate(task.options)
        damping, integer = options["damping"], options["zeros"] == "integer"
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        weights: dict[str, torch.Tensor] = {}
        errors: dict[str, float] = {}
        for stage in task.stages():
            moments = task.moments(stage, weights)
            for linear in stage:
                spec = task.specs[linear.name]
                if not isinstance(spec, AffineSpec):
                    raise InvalidInputError(f"{linear.name}: gptq stores the affine format, not {spec!r}.")
                weight = task.weights[linear.weight]
                codes, scales, zeros = feedback_codes(weight, moments, spec, damping, integer)
                stored = AFFINE.pack(spec, codes, scales, zeros)
                tensors[linear.name] = stored
                weights[linear.weight] = AFFINE.dequantize(spec, stored, linear.in_features, torch.float32)
                difference = weights[linear.weight] - weight
                total = ((weight @ moments.gram) * weight).sum()
                errors[linear.name] = float(((difference @ moments.gram) * difference).sum() / total)
                task.tell(f"{linear.name}: relative error {errors[linear.name]:.5f}")
        return BlockResult(tensors, dict(task.specs), weights, {"layer_error": errors})


@torch.no_grad()
def feedback_codes(
    weight: torch.Tensor,
    moments: Moments,
    spec: AffineSpec,
    damping: float = 0.01,
    integer_zeros: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K], scales and zeros [N, groups] of a weight [N, K]."""
    weight = weight.float()
    size = weight.shape[1]
    gram = moments.gram.double()
    dead = gram.diagonal() <= 0
    extra = damping * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram = gram + torch.diag(extra.expand(size) * torch.where(dead, 1 / damping, 1.0))
    if moments.cross is not None:
        right = (moments.cross.double() + gram - moments.gram.double()) @ weight.double().T
        weight = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).T.float()
    scales, zeros = group_ranges(weight, gram.diagonal().float(), spec, integer_zeros)
    group = torch.arange(size, device=weight.device) // (spec.group_size or size)
    order = gram.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    rest = weight[:, order].contiguous()
    scale, zero = scales[:, group[order]], zeros[:, group[order]]
    codes = torch.empty_like(rest)
    top = 2**spec.bits - 1
    for begin in range(0, size, _LAZY_COLUMNS):
        end = min(begin + _LAZY_COLUMNS, size)
        spread = torch.zeros(weight.shape[0], end - begin, device=weight.device)
        for j in range(begin, end):
            codes[:, j] = (rest[:, j] / scale[:, j] + zero[:, j]).round().clamp(0, top)
            error = (rest[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / upper[j, j]
            rest[:, j + 1 : end].addr_(error, upper[j, j + 1 : end], alpha=-1.0)
            spread[:, j - begin] = error
        rest[:, end:].addmm_(spread, upper[begin:end, end:], alpha=-1.0)
    natural = torch.empty_like(codes, dtype=torch.uint8)
    natural[:, order] = codes.to(torch.uint8)
    return natural, scales, zeros


def group_ranges(
    weight: torch.Tensor, importance: torch.Tensor, spec: AffineSpec, integer_zeros: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [N, groups] as stored: hqq's search with columns [K] weighted by `importance`."""
    rows, size = weight.shape
    width = spec.group_size or size
    scales, zeros = [], []
    # The last group may be shorter than the others.
    for begin, end in ((0, size // width * width), (size // width * width, size)):
        if begin == end:
            continue
        length = min(width, end - begin)
        groups = weight[:, begin:end].reshape(-1, length)
        counts = importance[begin:end].reshape(1, -1, length).expand(rows, -1, -1).reshape(-1, length)
        if integer_zeros:
            _, scale, zero = integer_groups(groups, spec, counts, HQQ().clips(spec))
        else:
            _, scale, zero = HQQ().solve_groups(groups, spec, counts)
        scales.append(scale.reshape(rows, -1))
        zeros.append(zero.reshape(rows, -1))
    return torch.cat(scales, 1), torch.cat(zeros, 1)
