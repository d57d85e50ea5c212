"""GPTQ: round column by column, later columns make up for the error of earlier ones (Frantar et al. 2022).

With H the damped Gram matrix of the input and H⁻¹ = UᵀU, the error e of column j is spread over the columns
behind it as −e/U_jj·U_j,rest. Columns go in the order of falling H_jj (act-order), but every column keeps the
scale and zero point of its group in the weight's own order, fixed before the first is rounded: the stored
format is plain `affine` and no gather is needed at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.calibration.task import BlockResult, BlockTask, Moments
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec, num_groups

_LAZY_COLUMNS = 128


@dataclass(frozen=True)
class Gptq:
    """The method.

    Attributes:
        damping: Share of the Gram matrix's mean diagonal that is added to its diagonal.
        clips: How many narrower ranges are tried per group.
        narrowest: The narrowest of them, as a share of the full range.
        follow_original: Aim at the original model's outputs where the runner keeps its stream.
    """

    damping: float = 0.01
    clips: int = 10
    narrowest: float = 0.5
    follow_original: bool = True

    name = "gptq"
    format = "affine"

    def default_spec(self, bits: int) -> AffineSpec:
        """Affine codes in groups of 64."""
        return AffineSpec(bits, 64)

    def quantize_block(self, task: BlockTask) -> BlockResult:
        """See `CalibratedMethod`; norms and biases stay as they are."""
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
                codes, scales, zeros = self.quantize(weight, moments, spec)
                stored = AFFINE.pack(spec, codes, scales, zeros)
                tensors[linear.name] = stored
                weights[linear.weight] = AFFINE.dequantize(spec, stored, linear.in_features, torch.float32)
                difference = weights[linear.weight] - weight
                total = ((weight @ moments.gram) * weight).sum()
                errors[linear.name] = float(((difference @ moments.gram) * difference).sum() / total)
                task.tell(f"{linear.name}: relative error {errors[linear.name]:.5f}")
        return BlockResult(tensors, dict(task.specs), weights, {"layer_error": errors})

    @torch.no_grad()
    def quantize(
        self, weight: torch.Tensor, moments: Moments, spec: AffineSpec
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8 [N, K], scales and zeros [N, groups] of a weight [N, K]."""
        weight = weight.float()
        size = weight.shape[1]
        gram = moments.gram.double()
        dead = gram.diagonal() <= 0
        extra = self.damping * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        gram = gram + torch.diag(extra.expand(size) * torch.where(dead, 1 / self.damping, 1.0))
        if self.follow_original and moments.cross is not None:
            right = (moments.cross.double() + gram - moments.gram.double()) @ weight.double().T
            weight = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).T.float()
        scales, zeros = self._ranges(weight, gram.diagonal().float(), spec)
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

    def _ranges(
        self, weight: torch.Tensor, importance: torch.Tensor, spec: AffineSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros [N, groups] as stored: of several ranges the one with the least weighted error."""
        rows, size = weight.shape
        count = num_groups(spec.group_size, size)
        width = spec.group_size or size
        padded = torch.nn.functional.pad(weight, (0, count * width - size)).reshape(rows, count, width)
        counts = torch.nn.functional.pad(importance, (0, count * width - size)).reshape(1, count, width)
        low, high = padded.amin(2).clamp_max(0.0), padded.amax(2).clamp_min(0.0)
        top = 2**spec.bits - 1
        best = torch.full((rows, count), float("inf"), device=weight.device)
        scales, zeros = torch.ones_like(best), torch.zeros_like(best)
        for share in torch.linspace(1.0, self.narrowest, max(1, self.clips)).tolist():
            scale = (share * (high - low) / top).to(spec.scale_dtype).float()
            scale = torch.where(scale > 0, scale, 1.0)
            zero = (-share * low / scale).to(spec.zero_dtype).float()
            code = (padded / scale[:, :, None] + zero[:, :, None]).round().clamp(0, top)
            error = (((code - zero[:, :, None]) * scale[:, :, None] - padded).square() * counts).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        return scales, zeros
