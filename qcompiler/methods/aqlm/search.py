"""Choice of codes: beam search over the codebooks inside a group, error feedback and descent across groups.

All of it minimises Σ_r s_r² (ŵ_r − w_r) H (ŵ_r − w_r)ᵀ for rows w_r over given codebooks, H the damped Gram
matrix of the layer's input. Rows are independent of each other, groups of a row are not:

- `feedback_pass` takes the groups in order and lets the groups still to come make up for the error of each
  (GPTQ's update, Frantar et al. 2022, with a group in place of a column): with H⁻¹ = UᵀU, the error e of
  group g costs ‖e·U_gg⁻¹‖² and moves the targets behind it by −e·U_gg⁻¹·U_g,rest.
- `descent_pass` goes over the groups again with all the others fixed: group g aims at ŵ_g − (E·H)_g·H_gg⁻¹ in
  the norm of H_gg, E = ŵ − w. It never makes the sum larger.
"""

from __future__ import annotations

import torch


def max_elements(device: torch.device) -> int:
    """Elements of the largest temporary, [rows, beam, codewords]: to fill a GPU, to stay in a CPU's cache."""
    return 1 << (28 if device.type == "cuda" else 21)


def smallest(values: torch.Tensor) -> torch.Tensor:
    """Index of the smallest value of each row [R, C]; a CPU finds values several times as fast as indices."""
    columns = values.shape[1]
    run = 1 << (columns.bit_length() // 2)
    if values.is_cuda or columns < 1024 or columns % run:
        return values.argmin(1)
    runs = values.view(values.shape[0], -1, run)
    best = runs.amin(2).argmin(1)
    rows = torch.arange(values.shape[0], device=values.device)
    return best * run + runs[rows, best].argmin(1)


def choose_codes(
    target: torch.Tensor, codebooks: torch.Tensor, beam: int, start: torch.Tensor | None = None
) -> torch.Tensor:
    """For each row the codes whose codewords sum up nearest to it, by beam search over the codebooks.

    Args:
        target: [N, d].
        codebooks: [M, C, d].
        beam: Partial sums kept per row.
        start: int64 [N, M], codes to keep where the search finds none better.

    Returns:
        Codes int64 [N, M].
    """
    # A single codebook has no sums to keep: its nearest codeword is the answer.
    kept = 1 if codebooks.shape[0] == 1 else max(1, beam)
    rows = max(1, max_elements(target.device) // (kept * codebooks.shape[1]))
    parts = [
        _choose_rows(part, codebooks, beam, None if start is None else start[first : first + rows])
        for first, part in zip(range(0, target.shape[0], rows), target.split(rows), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _choose_rows(
    target: torch.Tensor, codebooks: torch.Tensor, beam: int, start: torch.Tensor | None
) -> torch.Tensor:
    count, codewords, _ = codebooks.shape
    norms = codebooks.square().sum(2)
    doubled = 2.0 * codebooks
    # |t − Σc|² without |t|²: linear terms per codebook, and twice the inner product with the sum so far.
    cost = torch.addmm(norms[0], target, doubled[0].T, alpha=-1.0)
    if count == 1:
        return smallest(cost).unsqueeze(1)
    width = min(beam, codewords)
    costs, first = cost.topk(width, dim=1, largest=False, sorted=False)
    codes = first.unsqueeze(2)
    sums = codebooks[0][first]
    for m in range(1, count):
        own = torch.addmm(norms[m], target, doubled[m].T, alpha=-1.0)
        joint = sums @ doubled[m].T
        joint += own.unsqueeze(1)
        joint += costs.unsqueeze(2)
        flat = joint.flatten(1)
        keep = 1 if m == count - 1 else min(beam, flat.shape[1])
        if keep == 1:
            index = smallest(flat).unsqueeze(1)
            costs = flat.gather(1, index)
        else:
            costs, index = flat.topk(keep, dim=1, largest=False, sorted=False)
        parent, code = index // codewords, index % codewords
        codes = torch.cat([codes.gather(1, parent.unsqueeze(2).expand(-1, -1, m)), code.unsqueeze(2)], dim=2)
        sums = sums.gather(1, parent.unsqueeze(2).expand(-1, -1, sums.shape[2])) + codebooks[m][code]
    found, best, total = codes[:, 0], costs[:, 0], sums[:, 0]
    if start is not None:
        held = sum_codewords(codebooks, start)
        held_cost = (held * (held - 2.0 * target)).sum(1)
        better = best < held_cost
        found = torch.where(better.unsqueeze(1), found, start)
        total = torch.where(better.unsqueeze(1), total, held)
    if count > 2:
        found = _refine(target, codebooks, norms, found, total)
    return found


def _refine(
    target: torch.Tensor,
    codebooks: torch.Tensor,
    norms: torch.Tensor,
    codes: torch.Tensor,
    total: torch.Tensor,
) -> torch.Tensor:
    """Choose each code anew with the others fixed."""
    codes = codes.clone()
    for m in range(codebooks.shape[0]):
        rest = total - codebooks[m][codes[:, m]]
        codes[:, m] = torch.addmm(norms[m], target - rest, codebooks[m].T, alpha=-2.0).argmin(1)
        total = rest + codebooks[m][codes[:, m]]
    return codes


def sum_codewords(codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Σ_m codebooks[m, codes[..., m]]: [..., d]."""
    total = codebooks[0][codes[..., 0]]
    for m in range(1, codebooks.shape[0]):
        total = total + codebooks[m][codes[..., m]]
    return total


class Metric:
    """What the passes need of one Gram matrix; made once for all the linears that read the same input.

    Args:
        gram: [K, K], K a multiple of the group size; symmetric, positive semidefinite.
        group_size: d.
        damping: Share of the mean diagonal that is added to the diagonal.
    """

    def __init__(self, gram: torch.Tensor, group_size: int, damping: float = 0.01):
        size = gram.shape[0]
        self.group_size = group_size
        self.groups = size // group_size
        diagonal = gram.diagonal()
        level = damping * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        self.gram = gram + level * torch.eye(size, device=gram.device)
        weight = self.gram.diagonal().reshape(self.groups, group_size)
        # Groups that matter most go first: the most is left to make up for their errors.
        self.order = weight.sum(1).argsort(descending=True)
        columns = (self.order[:, None] * group_size + torch.arange(group_size, device=gram.device)).flatten()
        ordered = self.gram[columns][:, columns]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered.double()))
        upper = torch.linalg.cholesky(inverse, upper=True)
        blocks = self._diagonal(upper)
        inverted = torch.linalg.inv(blocks)
        # Row g: U_gg⁻¹·U_g, so that an error times it moves the targets of all later groups.
        spread = torch.einsum("gij,gjk->gik", inverted, upper.reshape(self.groups, group_size, size))
        self.feedback_factors = inverted.float()
        self.feedback = spread.float()
        own = self._diagonal(self.gram.double())
        self.descent_factors = torch.linalg.cholesky(own).float()
        self.own_inverse = torch.linalg.inv(own).float()
        self.columns = columns

    def _diagonal(self, matrix: torch.Tensor) -> torch.Tensor:
        d = self.group_size
        return matrix.reshape(self.groups, d, self.groups, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error(self, difference: torch.Tensor) -> torch.Tensor:
        """Per row e·H·eᵀ of differences [N, K]."""
        return ((difference @ self.gram) * difference).sum(1)


def feedback_pass(weight: torch.Tensor, codebooks: torch.Tensor, metric: Metric, beam: int) -> torch.Tensor:
    """Codes int64 [N, G, M] of rows [N, K], group by group with error feedback."""
    d = metric.group_size
    codes = torch.empty(
        weight.shape[0], metric.groups, codebooks.shape[0], dtype=torch.int64, device=weight.device
    )
    rest = weight[:, metric.columns].contiguous()
    for step, group in enumerate(metric.order.tolist()):
        begin, end = step * d, (step + 1) * d
        factor = metric.feedback_factors[step]
        target = rest[:, begin:end]
        codes[:, group] = choose_codes(target @ factor, codebooks @ factor, beam)
        error = target - sum_codewords(codebooks, codes[:, group])
        if end < rest.shape[1]:
            rest[:, end:].addmm_(error, metric.feedback[step, :, end:], alpha=-1.0)
    return codes


def descent_pass(
    weight: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, metric: Metric, beam: int
) -> torch.Tensor:
    """Codes that fit rows [N, K] no worse than the given ones int64 [N, G, M]; one visit to each group."""
    d = metric.group_size
    codes = codes.clone()
    current = sum_codewords(codebooks, codes)
    pull = (current.flatten(1) - weight) @ metric.gram
    for group in metric.order.tolist():
        begin, end = group * d, (group + 1) * d
        factor = metric.descent_factors[group]
        target = current[:, group] - pull[:, begin:end] @ metric.own_inverse[group]
        codes[:, group] = choose_codes(target @ factor, codebooks @ factor, beam, codes[:, group])
        chosen = sum_codewords(codebooks, codes[:, group])
        pull.addmm_(chosen - current[:, group], metric.gram[begin:end])
        current[:, group] = chosen
    return codes
