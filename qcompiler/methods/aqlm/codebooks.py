"""Codebooks: residual k-means to begin with, then least squares for codebooks and scales with codes fixed.

With the codes given, the layer's error is quadratic in the codewords. AQLM
takes 100 Adam steps on it (`adam_codebooks`); conjugate gradients
(`solve_codebooks`) reach a lower error in a dozen steps of the same cost.
"""

from __future__ import annotations

import torch

from qcompiler.methods.aqlm.search import Metric, max_elements, smallest, sum_codewords
from qcompiler.methods.aqlm.sums import CodewordSums, sums_of, tunable_sum


def kmeans(
    points: torch.Tensor, weights: torch.Tensor, clusters: int, steps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm with weighted points.

    Args:
        points: [P, d].
        weights: [P], not negative.
        clusters: How many centres; those that lose all their points are put on points with a large error.
        steps: Rounds.
        generator: For the start, points drawn by weight.

    Returns:
        Centres [clusters, d], and the centre of each point int64 [P].
    """
    size = min(clusters, points.shape[0])
    drawn = _draw(weights, size, generator)
    centres = torch.zeros(clusters, points.shape[1], device=points.device)
    centres[:size] = points[drawn]
    index = nearest(points, centres)
    for _ in range(steps):
        by_centre = CodewordSums(index, clusters)
        total = by_centre(weights[:, None])[:, 0]
        sums = by_centre(points * weights[:, None])
        used = total > 0
        centres = torch.where(used[:, None], sums / total.clamp_min(1e-30)[:, None], centres)
        empty = (~used).nonzero().flatten()
        if 0 < len(empty) <= points.shape[0] - clusters:
            error = (points - centres[index]).square().sum(1) * weights
            centres[empty] = points[error.topk(len(empty)).indices]
        found = nearest(points, centres)
        if torch.equal(found, index):
            break
        index = found
    return centres, index


def _draw(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct points with probability by weight (the largest of Gumbel-shifted log weights)."""
    uniform = torch.rand(weights.shape, generator=generator).to(weights.device).clamp_(1e-12, 1 - 1e-7)
    return (weights.clamp_min(1e-30).log() - (-uniform.log()).log()).topk(count).indices


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre of each point."""
    norms = centres.square().sum(1)
    chunk = max(1, max_elements(points.device) // centres.shape[0])
    return torch.cat(
        [smallest(torch.addmm(norms, part, centres.T, alpha=-2.0)) for part in points.split(chunk)]
    )


def residual_kmeans(
    weight: torch.Tensor,
    row_weights: torch.Tensor,
    metric: Metric,
    shape: tuple[int, int],
    steps: int,
    generator: torch.Generator,
    max_points: int = 1 << 15,
) -> torch.Tensor:
    """Codebooks [M, C, d] for rows [N, K], each codebook on what the ones before leave.

    Groups count by the weight of their row and by the mean diagonal of the metric.

    Args:
        weight: [N, K].
        row_weights: [N].
        metric: Of the layer's input.
        shape: (M, C).
        steps: Rounds of k-means per codebook.
        generator: For the starts.
        max_points: Groups used at most, drawn at random.
    """
    d = metric.group_size
    points = weight.reshape(-1, d)
    importance = metric.gram.diagonal().reshape(metric.groups, d).mean(1)
    weights = (row_weights[:, None] * importance[None]).flatten()
    limit = max(max_points, 8 * shape[1])
    if points.shape[0] > limit:
        chosen = torch.randperm(points.shape[0], generator=generator)[:limit].to(points.device)
        points, weights = points[chosen], weights[chosen]
    books = []
    for _ in range(shape[0]):
        centres, index = kmeans(points, weights, shape[1], steps, generator)
        books.append(centres)
        points = points - centres[index]
    return torch.stack(books)


class _Quadratic:
    """The error as a function of the codewords, with codes and scales fixed."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, metric: Metric, codewords: int):
        self.metric = metric
        self.square = scales.square()[:, None]
        self.sums = sums_of(codes, codewords)

    def scatter(self, groups: torch.Tensor) -> torch.Tensor:
        """Sum values [N, K] of groups by the codewords that they use: [M, C, d]."""
        points = groups.reshape(-1, self.metric.group_size)
        return torch.stack([sums(points) for sums in self.sums])

    def __call__(self, difference: torch.Tensor) -> torch.Tensor:
        """Half the gradient with respect to the codewords at ŵ − w = difference."""
        return self.scatter((difference @ self.metric.gram) * self.square)

    def curvature(self) -> torch.Tensor:
        """Half the diagonal of the Hessian, [M, C, d]; 0 for unused codewords."""
        diagonal = self.metric.gram.diagonal()[None] * self.square
        return self.scatter(diagonal)


def solve_codebooks(
    weight: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    metric: Metric,
    steps: int = 16,
) -> torch.Tensor:
    """Codebooks nearer to the least-squares solution, by conjugate gradients with a diagonal preconditioner.

    Args:
        weight: Rows over their scales, [N, K].
        codes: int64 [N, G, M].
        codebooks: [M, C, d] to start from.
        scales: [N]; a row counts by its square.
        metric: Of the layer's input.
        steps: Rounds.
    """
    quadratic = _Quadratic(codes, scales, metric, codebooks.shape[1])
    curvature = quadratic.curvature()
    inverse = torch.where(curvature > 0, 1.0 / curvature.clamp_min(1e-30), 0.0)
    solution = codebooks.clone()
    residual = -quadratic(sum_codewords(codebooks, codes).flatten(1) - weight)
    preconditioned = inverse * residual
    direction = preconditioned
    power = (residual * preconditioned).sum()
    for _ in range(steps):
        if not float(power) > 0:
            break
        image = quadratic(sum_codewords(direction, codes).flatten(1))
        step = power / (direction * image).sum().clamp_min(1e-30)
        solution += step * direction
        residual = residual - step * image
        preconditioned = inverse * residual
        following = (residual * preconditioned).sum()
        direction = preconditioned + (following / power) * direction
        power = following
    return solution


def adam_codebooks(
    weight: torch.Tensor,
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    metric: Metric,
    steps: int = 100,
    rate: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AQLM's own update of codebooks and scales: Adam without momentum, amsgrad.

    Args:
        weight: Rows as they are (not over their scales), [N, K].
        codes: int64 [N, G, M].
        codebooks: [M, C, d].
        scales: [N].
        metric: Of the layer's input.
        steps: Steps.
        rate: Learning rate.

    Returns:
        Codebooks and scales.
    """
    books = codebooks.clone().requires_grad_()
    sizes = scales.clone().requires_grad_()
    optimizer = torch.optim.Adam([books, sizes], lr=rate, betas=(0.0, 0.95), amsgrad=True)
    total = metric.error(weight).sum()
    sums = sums_of(codes, codebooks.shape[1])
    for _ in range(steps):
        with torch.enable_grad():
            difference = tunable_sum(books, codes, sums).flatten(1) * sizes[:, None] - weight
            loss = metric.error(difference).sum() / total
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return books.detach(), sizes.detach()


def refit_scales(
    weight: torch.Tensor, shape: torch.Tensor, scales: torch.Tensor, metric: Metric
) -> torch.Tensor:
    """Per row the scale that brings scale · shape [N, K] nearest to weight; as before where undefined."""
    image = shape @ metric.gram
    square = (image * shape).sum(1)
    return torch.where(square > 0, (image * weight).sum(1) / square.clamp_min(1e-30), scales)
