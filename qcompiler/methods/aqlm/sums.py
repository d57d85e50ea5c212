"""Sums over the groups that use a codeword, the gradient of a sum of codewords; the same every time.

On a CPU that is `index_add_`. On a GPU its atomic additions come in any order and crowd on few codewords,
so there the groups are sorted by codeword once, summed in runs, and the runs' sums in runs again.
"""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.methods.aqlm.search import sum_codewords

_RUN = 32


class CodewordSums:
    """Function of values [P, d] giving their sums by codeword [codewords, d].

    Args:
        index: int64 [P], the codeword of each group.
        codewords: How many there are.
        in_runs: Sum in runs of sorted groups; by default everywhere but on CPUs.
    """

    def __init__(self, index: torch.Tensor, codewords: int, in_runs: bool | None = None):
        self.index = index
        self.codewords = codewords
        self.levels: list[torch.Tensor] = []
        if not (index.is_cuda if in_runs is None else in_runs):
            return
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=codewords)
        while True:
            runs = (counts + (_RUN - 1)) // _RUN
            total = int(runs.sum())
            owner = torch.repeat_interleave(
                torch.arange(codewords, device=index.device), counts, output_size=len(order)
            )
            rank = torch.arange(len(order), device=index.device) - (counts.cumsum(0) - counts)[owner]
            first_run = (runs.cumsum(0) - runs)[owner]
            # Runs that are not full read a row of zeros, which stands behind the values.
            gather = torch.full((total, _RUN), len(order), dtype=torch.int64, device=index.device)
            gather[first_run + rank // _RUN, rank % _RUN] = order
            self.levels.append(gather)
            if not total or int(runs.max()) <= 1:
                break
            counts, order = runs, torch.arange(total, device=index.device)
        self.used = runs.nonzero().flatten()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """See the class; `values` [P, d]."""
        out = torch.zeros(self.codewords, values.shape[1], dtype=values.dtype, device=values.device)
        if not self.levels:
            return out.index_add_(0, self.index, values)
        for gather in self.levels:
            values = torch.cat([values, values.new_zeros(1, values.shape[1])])[gather].sum(1)
        out[self.used] = values
        return out


class _SumOfCodewords(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codebooks: torch.Tensor, codes: torch.Tensor, sums: list[CodewordSums]
    ) -> torch.Tensor:
        ctx.sums = sums
        return sum_codewords(codebooks, codes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        groups = grads[0].flatten(0, -2)
        return torch.stack([sums(groups) for sums in ctx.sums]), None, None


def tunable_sum(codebooks: torch.Tensor, codes: torch.Tensor, sums: list[CodewordSums]) -> torch.Tensor:
    """`sum_codewords` [..., d], differentiable in the codebooks [M, C, d]; `sums` are those of `codes`."""
    result: torch.Tensor = _SumOfCodewords.apply(codebooks, codes, sums)
    return result


def sums_of(codes: torch.Tensor, codewords: int) -> list[CodewordSums]:
    """The sums of each codebook for codes [..., M]."""
    return [CodewordSums(part.contiguous(), codewords) for part in codes.flatten(0, -2).unbind(1)]
