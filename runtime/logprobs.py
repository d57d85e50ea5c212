"""Log probabilities of chosen tokens and of the likeliest ones, by the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from qcompiler.runtime.sampling import tensor_on


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a chosen token, by the model's own logits, and those of the likeliest tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Logprobs:
    """Log probabilities for the rows of a step that want them, before any penalty or temperature.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        tokens: The chosen tokens [rows], −1 where there is none.
        counts: For each row, how many of the likeliest tokens to give; None for a row that wants nothing.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, counts: Seq[int | None]):
        self._counts = counts
        self._wanted = [i for i, count in enumerate(counts) if count is not None]
        self.tensors: list[torch.Tensor] = []  # what the host has to read
        if not self._wanted:
            return
        if len(self._wanted) < len(counts):
            rows = tensor_on(self._wanted, torch.int64, logits.device)
            logits, tokens = logits[rows], tokens[rows]
        scores = logits.float().log_softmax(-1)
        chosen = scores.gather(1, tokens.clamp_min(0).unsqueeze(1)).squeeze(1)
        best = scores.topk(max(counts[i] or 0 for i in self._wanted), dim=-1)
        self.tensors = [chosen, best.values, best.indices]

    def values(self, read: Seq[torch.Tensor]) -> list[TokenLogprob | None]:
        """One for each row, from what the host has read of `tensors`."""
        result: list[TokenLogprob | None] = [None] * len(self._counts)
        if not self._wanted:
            return result
        chosen, values, ids = (tensor.tolist() for tensor in read)
        for row, i in enumerate(self._wanted):
            count = self._counts[i] or 0
            result[i] = TokenLogprob(
                chosen[row], tuple(zip(ids[row][:count], values[row][:count], strict=True))
            )
        return result
