"""HQQ: calibration-free quantization by optimising each group's scale and zero point.

Two solvers over the same storage. `reference` is the published one (`hqq_reference`), which moves
zero points only. `search`, the default, minimises per group

    Σ_j u_j (w_j - (q_j - z)·s)²        over codes q, scale s and zero z

by starting from several clips of the group's range at both ends and alternating rounding to codes
with the least-squares line through (code, weight). For given codes the best line has the closed
form s = cov_u(q, w)/var_u(q) and leaves var_u(w) - cov_u(q, w)²/var_u(q), so a round takes three
sums over the group. The last rounds are run on scales and zeros as stored, and the result is kept
only where it beats plain rounding.

With a tail (`tail_fraction`) the largest weights are kept beside the groups, which are solved without them:
see `body_tail`.

The importances u stand in for the inputs that a calibration-free method does not see. With c_j the
size of column j (its mean magnitude) and y = w/c_j, u = c_j⁻²·sqrt(1 + y²): errors count relative to the
column, so that a scale moved between an input feature and its column (as normalisation layers have
it) changes nothing, and large weights count somewhat more than small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.kernels.affine_search import Search
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.body_tail import TAIL_BITS, BodyTailSpec
from qcompiler.methods import fused_affine, hqq_reference
from qcompiler.methods.affine import AffineMethod, Groups, Solution, check_range, check_weight, store
from qcompiler.methods.base import MethodOption
from qcompiler.methods.body_tail import AUTO, FRACTIONS, choose_fraction, parse_fraction, quantize_body_tail
from qcompiler.methods.integer_zeros import OPTION as ZEROS

# The fewer the levels, the more of a group's range the best line leaves out.
SEARCHES = {
    2: Search(0.40, 0.90, 5),
    3: Search(0.55, 1.00, 5),
    4: Search(0.75, 1.05, 5),
    5: Search(0.85, 1.03, 4),
    6: Search(0.92, 1.02, 4),
    8: Search(0.98, 1.00, 2),
}
_FEWEST_ROWS = 32  # fewer do not tell the size of their columns; all count the same then
_NORMAL = math.sqrt(math.pi / 2)  # root mean square over mean magnitude of normal weights
_COLUMN_LIMIT = 4.0  # a column counts as at most so many times larger or smaller than the average


class HQQ(AffineMethod):
    """Half-quadratic quantization."""

    name = "hqq"
    summary = "calibration-free search for each group's best scale and zero point"
    options: ClassVar[Mapping[str, MethodOption]] = {
        "solver": MethodOption(
            "search",
            ("search", "reference"),
            "search: ours, lower error at the same size; reference: the published solver, exactly",
        ),
        "zeros": ZEROS,
        "tail_fraction": MethodOption(
            "0", None, "part of the weights beside the body, coded logarithmically; auto: by their error"
        ),
        "tail_bits": MethodOption(8, TAIL_BITS, "bits of such a weight, sign and logarithm"),
    }

    def validate(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See `Method.validate`; the published solver knows no tail and no integer zero points."""
        given = dict(options or {})
        if type(given.get("tail_fraction")) in (int, float):  # as one writes it in Python and YAML
            given["tail_fraction"] = str(given["tail_fraction"])
        resolved = super().validate(given)
        if parse_fraction(resolved["tail_fraction"]) != 0 and resolved["solver"] != "search":
            raise InvalidInputError(
                "the published solver knows no tail", hint="Use the solver 'search', or a tail fraction of 0."
            )
        if resolved["zeros"] == "integer":
            if resolved["solver"] == "reference":
                raise InvalidInputError(
                    "the published hqq solver has no integer zero points",
                    hint="Drop --hqq-solver reference.",
                )
            if parse_fraction(resolved["tail_fraction"]) != 0:
                raise InvalidInputError(
                    "a body beside a tail has no integer zero points", hint="Drop --tail-fraction."
                )
        return resolved

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Any:
        """See `Method.resolve_spec`: affine, or body_tail where the options ask for a tail.

        Before `settle` has chosen a fraction, `auto` stands for the smallest on offer.
        """
        spec = super().resolve_spec(bits, group_size)
        resolved = self.validate(options)
        fraction = parse_fraction(resolved["tail_fraction"])
        if fraction == 0:
            return spec
        fraction = FRACTIONS[0] if fraction is None else fraction
        return BodyTailSpec(spec.bits, spec.group_size, fraction, resolved["tail_bits"], spec.scale_dtype)

    def settle(
        self,
        bits: int,
        group_size: int | None,
        options: Mapping[str, Any],
        samples: Callable[[], list[Tensor]],
    ) -> dict[str, Any]:
        """See `Method.settle`: `auto` becomes a fraction."""
        resolved = self.validate(options)
        if resolved["tail_fraction"] != AUTO:
            return resolved
        spec = self.resolve_spec(bits, group_size, resolved)
        return {**resolved, "tail_fraction": str(choose_fraction(self, samples(), spec, resolved))}

    def plain(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """See `Method.plain`: no tail."""
        return {**options, "tail_fraction": "0"}

    def quantize(
        self, weight: Tensor, spec: Any, options: Mapping[str, Any] | None = None, *, name: str = "weight"
    ) -> dict[str, Tensor]:
        """See `Method.quantize`."""
        if isinstance(spec, BodyTailSpec):
            return quantize_body_tail(self, weight, spec, self.validate(options), name=name)
        return super().quantize(weight, spec, options, name=name)

    def solve(
        self,
        weight: Tensor,
        spec: AffineSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
        chunk_weights: int | None = None,
    ) -> Solution:
        """See `AffineMethod.solve`.

        The reference solver's scales and zeros are left in fp32, as the package gives them before they are
        stored, and `chunk_weights` does not apply to it.
        """
        if self.validate(options)["solver"] == "search":
            return super().solve(weight, spec, options, name=name, chunk_weights=chunk_weights)
        check_weight(weight, spec, name)
        rows, columns = weight.shape
        size = spec.group_size or columns
        whole = columns // size * size
        sides = [weight[:, :whole].float().reshape(-1, size)] if whole else []
        if whole < columns:
            sides.append(weight[:, whole:].float())
        found = [
            Solution(
                codes.reshape(rows, -1).to(torch.uint8), scales.reshape(rows, -1), zeros.reshape(rows, -1)
            )
            for codes, scales, zeros in hqq_reference.solve(sides, spec.bits)
        ]
        return Solution(*(torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True)))

    def fused(
        self, weight: Tensor, spec: AffineSpec, options: Mapping[str, Any], name: str
    ) -> dict[str, Tensor] | None:
        """See `AffineMethod.fused`; the published solver runs in torch."""
        if options["solver"] != "search":
            return None
        search = SEARCHES[spec.bits]
        if weight.shape[1] % spec.group_size:
            # As in `solve`, the columns of a last group that is short are measured apart from the others.
            check_weight(weight, spec, name)
            whole = weight.shape[1] // spec.group_size * spec.group_size
            sides = [side for side in (weight[:, :whole], weight[:, whole:]) if side.shape[1]]
            inverse, inverse_square = zip(*(self.statistics(side, options) for side in sides), strict=True)
            columns = torch.cat(inverse), torch.cat(inverse_square)
            return fused_affine.quantize(weight, spec, search, columns)
        weight = weight.contiguous()
        limit = _COLUMN_LIMIT if weight.shape[0] >= _FEWEST_ROWS else 1.0
        found = fused_affine.columns(weight, _NORMAL / weight.shape[0], limit)
        tensors = fused_affine.quantize(weight, spec, search, (found.inverse, found.inverse_square))
        # Looked at last: waiting for the GPU before its work is in the queue would leave it idle.
        low, high, squares = found.summary.tolist()
        if math.isfinite(squares):
            check_range(low, high, spec, name)
        else:
            check_weight(weight, spec, name)
        return tensors

    def statistics(self, weight: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """1/c and (average c / c)² of the columns' sizes c, limited; both fp32 [columns]."""
        # The mean magnitude, unlike the root mean square, does not let one outlier decide for its column.
        sums = torch.linalg.vector_norm(weight, ord=1, dim=0, dtype=torch.float32)
        columns = sums * (_NORMAL / weight.shape[0])
        average = columns.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        relative = (columns / average).clamp(1 / _COLUMN_LIMIT, _COLUMN_LIMIT)
        if weight.shape[0] < _FEWEST_ROWS:
            relative = torch.ones_like(relative)
        return 1.0 / (relative * average), relative.pow(-2)

    def importance(self, rows: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
        """See `AffineMethod.importance`: c⁻²·sqrt(1 + (w/c)²), in units of the average column."""
        inverse, inverse_square = statistics
        return (rows * inverse).square_().add_(1.0).sqrt_().mul_(inverse_square)

    def clips(self, spec: AffineSpec) -> Sequence[float]:
        """See `AffineMethod.clips`: those of the search."""
        return SEARCHES[spec.bits].starts()

    def solve_groups(self, values: Tensor, spec: AffineSpec, importance: Tensor | None) -> Groups:
        """See `AffineMethod.solve_groups`."""
        if importance is None:
            importance = torch.ones_like(values)
        return _search(values, importance / importance.sum(dim=1, keepdim=True), spec)


class _Fit:
    """Rounds of one chunk of groups, with the buffers they share.

    Args:
        values: fp32 [groups, size], of mean 0 under `u`.
        u: Importances, fp32 [groups, size], of sum 1 per group.
        top: Highest code.
    """

    def __init__(self, values: Tensor, u: Tensor, top: float):
        self._values = values
        self._u = u
        self._weighted = values * u
        self._top = top
        self._codes = torch.empty_like(values)
        self._work = torch.empty_like(values)
        column = values[:, :1]
        self.best_gain = torch.full_like(column, -1.0)
        self.best_scale = torch.ones_like(column)
        self.best_zero = torch.zeros_like(column)

    def line(self, inverse_scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(covariance, variance, mean) of the codes nearest to a line: its refit has scale cov/var."""
        codes = torch.addcmul(zero, self._values, inverse_scale, out=self._codes)
        codes.round_().clamp_(0.0, self._top)
        mean = torch.mul(codes, self._u, out=self._work).sum(dim=1, keepdim=True)
        square = self._work.mul_(codes).sum(dim=1, keepdim=True)
        covariance = torch.mul(codes, self._weighted, out=self._work).sum(dim=1, keepdim=True)
        return covariance, (square - mean * mean).clamp_min_(1e-6), mean

    def run(self, inverse_scale: Tensor, zero: Tensor, rounds: int) -> None:
        """Alternate rounding and refitting from a start, remembering the best line met."""
        for _ in range(rounds):
            covariance, variance, mean = self.line(inverse_scale, zero)
            gain = covariance.square() / variance  # what the line takes off the squared error
            better = gain > self.best_gain
            scale = covariance / variance
            self.best_gain = torch.where(better, gain, self.best_gain)
            self.best_scale = torch.where(better, scale, self.best_scale)
            self.best_zero = torch.where(better, mean, self.best_zero)
            inverse_scale, zero = scale.clamp_min_(1e-12).reciprocal_(), mean


def _search(values: Tensor, u: Tensor, spec: AffineSpec) -> Groups:
    """The lines of least weighted squared error found for groups of weights, as stored."""
    search = SEARCHES[spec.bits]
    top = float(2**spec.bits - 1)
    low, high = values.aminmax(dim=1, keepdim=True)
    spread = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    mean = (values * u).sum(dim=1, keepdim=True)
    fit = _Fit((values - mean) / spread, u, top)
    below, above = (low - mean) / spread, (high - mean) / spread
    clips = search.starts()
    for clip_low in clips:
        for clip_high in clips:
            start = clip_low * below
            inverse_scale = top / (clip_high * above - start).clamp_min(1e-6)
            fit.run(inverse_scale, -start * inverse_scale, search.rounds)
    fit.run(fit.best_scale.clamp_min(1e-12).reciprocal(), fit.best_zero, search.last_rounds)

    largest = torch.maximum(-low, high)
    best = _Stored(values, u, top)
    best.offer(*store((high - low) / top, low, largest, spec))
    scale = fit.best_scale * spread
    best.offer(*store(scale, mean - fit.best_zero * scale, largest, spec))
    # Once more from the codes of the stored line, whose rounding may have moved some.
    inverse_scale = spread / best.scales
    covariance, variance, code = fit.line(inverse_scale, best.zeros + mean / best.scales)
    scale = covariance / variance * spread
    best.offer(*store(scale, mean - code * scale, largest, spec))
    return best.groups()


class _Stored:
    """Keeps, per group, the stored scale and zero of least weighted squared error among those offered."""

    def __init__(self, values: Tensor, u: Tensor, top: float):
        self._values = values
        self._u = u
        self._top = top
        self._error = torch.full_like(values[:, :1], float("inf"))
        self.scales = torch.ones_like(self._error)
        self.zeros = torch.zeros_like(self._error)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Try stored scales and zeros, fp32 [groups, 1]."""
        error = (self._codes(scales, zeros) - zeros).mul_(scales).sub_(self._values)
        error = error.square_().mul_(self._u).sum(dim=1, keepdim=True)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def groups(self) -> Groups:
        """The best, with its codes."""
        return Groups(self._codes(self.scales, self.zeros), self.scales, self.zeros)

    def _codes(self, scales: Tensor, zeros: Tensor) -> Tensor:
        return torch.round(self._values / scales + zeros).clamp_(0.0, self._top)
