"""One linear in additive codebooks: start, then codes and codebooks in turn until little is gained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.calibration.task import Moments
from qcompiler.kernels.formats.additive import AdditiveSpec
from qcompiler.methods.aqlm.codebooks import adam_codebooks, refit_scales, residual_kmeans, solve_codebooks
from qcompiler.methods.aqlm.phases import PhaseClock
from qcompiler.methods.aqlm.search import Metric, descent_pass, feedback_pass, sum_codewords


@dataclass(frozen=True)
class LayerSettings:
    """How a linear is fitted.

    Attributes:
        beam: Partial sums kept per row in the search of codes.
        kmeans_steps: Rounds of k-means per codebook.
        rounds: Rounds of codes and codebooks at most.
        feedback_rounds: The first so many rounds choose codes afresh with error feedback; later ones descend.
        min_gain: Stop when a round gains less than this share of the error.
        solver: "cg" or "adam" for the codebooks.
        damping: Share of the Gram matrix's mean diagonal that is added to its diagonal.
    """

    beam: int = 8
    kmeans_steps: int = 15
    rounds: int = 8
    feedback_rounds: int = 2
    min_gain: float = 0.01
    solver: str = "cg"
    damping: float = 0.05


@dataclass
class Fitted:
    """A linear in additive codebooks, in float32.

    Attributes:
        codes: int64 [N, G, M].
        codebooks: [M, C, d].
        scales: [N].
        in_features: K.
        error: ‖X₀Wᵀ − XŴᵀ‖² over ‖X₀Wᵀ‖², as far as the moments tell.
    """

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor
    in_features: int
    error: float

    def weight(self) -> torch.Tensor:
        """[N, K]."""
        return (sum_codewords(self.codebooks, self.codes).flatten(1) * self.scales[:, None])[
            :, : self.in_features
        ]


def make_metric(moments: Moments, spec: AdditiveSpec, damping: float) -> Metric:
    """The metric of an input, padded to whole groups."""
    padding = -moments.gram.shape[0] % spec.group_size
    return Metric(torch.nn.functional.pad(moments.gram, (0, padding, 0, padding)), spec.group_size, damping)


def corrected_weight(weight: torch.Tensor, moments: Moments, metric: Metric) -> torch.Tensor:
    """The weight that comes nearest to the original outputs on the inputs as they are now.

    W·crossᵀ·gram⁻¹ with the damping pulling towards W itself.
    """
    if moments.cross is None:
        return weight
    size = weight.shape[1]
    gram = metric.gram[:size, :size].double()
    extra = gram.diagonal() - moments.gram.diagonal().double()
    right = (moments.cross.double() + torch.diag(extra)) @ weight.double().T
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram)).T.float()


@torch.no_grad()
def fit_layer(
    weight: torch.Tensor,
    metric: Metric,
    spec: AdditiveSpec,
    settings: LayerSettings,
    seed: int,
    clock: PhaseClock | None = None,
) -> Fitted:
    """Fit a weight [N, K] in the norm of its input's Gram matrix."""
    clock = clock or PhaseClock(weight.device)
    in_features = weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    padding = metric.gram.shape[0] - in_features
    target = torch.nn.functional.pad(weight.float(), (0, padding)) if padding else weight.float()
    scales = target.square().mean(1).sqrt()
    scales = torch.where(scales > 0, scales, 1.0)
    with clock.phase("k-means"):
        books = residual_kmeans(
            target / scales[:, None],
            scales.square(),
            metric,
            (spec.codebooks, spec.codewords),
            settings.kmeans_steps,
            generator,
        )
    total = float(metric.error(target).sum()) or 1.0
    best: Fitted | None = None
    for round_ in range(settings.rounds):
        rows = target / scales[:, None]
        with clock.phase("codes"):
            if round_ < settings.feedback_rounds or best is None:
                codes = feedback_pass(rows, books, metric, settings.beam)
                if round_ + 1 >= settings.feedback_rounds:
                    codes = descent_pass(rows, codes, books, metric, settings.beam)
            else:
                codes = descent_pass(rows, codes, books, metric, settings.beam)
        with clock.phase("codebooks"):
            if settings.solver == "adam":
                books, scales = adam_codebooks(target, codes, books, scales, metric)
            else:
                books = solve_codebooks(rows, codes, books, scales, metric)
                scales = refit_scales(target, sum_codewords(books, codes).flatten(1), scales, metric)
        difference = sum_codewords(books, codes).flatten(1) * scales[:, None] - target
        error = float(metric.error(difference).sum()) / total
        previous = best.error if best is not None else float("inf")
        if error < previous:
            best = Fitted(codes, books, scales, in_features, error)
        if round_ >= settings.feedback_rounds and error > (1 - settings.min_gain) * previous:
            break
    if best is None:
        best = Fitted(codes, books, scales, in_features, error)
    return best
