"""How far a quantized model's next-token distributions are from the original's.

Per position, KL(P‖Q) = Σ_v p_v (log p_v - log q_v) with P the original and Q the quantized
distribution, in nats. Means are over all scored positions; the standard error treats each
window of text as one independent draw (tokens of one window are correlated), by the ratio
estimator of survey sampling (Cochran, "Sampling Techniques", 3rd ed., eq. 6.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qcompiler.kernels.errors import InvalidInputError, QualityGateError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """Agreement of a quantized model with its original over a text.

    Attributes:
        tokens: Scored positions.
        windows: Windows they came from.
        kl_mean: Mean KL divergence of the quantized from the original distribution, nats per token.
        kl_se: Standard error of `kl_mean` over windows (over tokens when there is one window only).
        top1_agreement: Fraction of positions where both models rank the same token first.
        perplexity: Of the quantized model on the text's own next tokens.
        perplexity_original: Of the original model on the same tokens.
    """

    tokens: int
    windows: int
    kl_mean: float
    kl_se: float
    top1_agreement: float
    perplexity: float
    perplexity_original: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the quantized model over that of the original."""
        return self.perplexity / self.perplexity_original

    def to_json(self) -> dict[str, float | int]:
        """The figures under the key names of `qcompile --json`."""
        return asdict(self)

    def require(self, max_kl: float) -> None:
        """Refuse a model whose mean KL divergence is above a limit.

        Raises:
            QualityGateError: `kl_mean` is above `max_kl`.
        """
        if not self.kl_mean <= max_kl:
            raise QualityGateError(
                f"KL divergence {self.kl_mean:.4g} ± {self.kl_se:.2g} is above the limit {max_kl:g} "
                "(--max-kl)",
                hint="Use more bits, a smaller group size, or keep sensitive layers at higher precision.",
            )


class QualityMeter:
    """Accumulates `Quality` one window at a time, so that no more than one window's logits are held.

    Args:
        chunk: Positions processed together; bounds the memory of the fp32 work to a few
            `chunk × vocabulary` arrays and has no influence on the result beyond rounding.
    """

    def __init__(self, chunk: int = 256):
        self._chunk = chunk
        self._windows: list[tuple[int, float]] = []  # (positions, sum of KL)
        self._kl_squares = 0.0
        self._agree = 0
        self._nll = 0.0
        self._nll_original = 0.0

    def update(self, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
        """Add one window.

        Args:
            original: Logits of the original model, [tokens, vocabulary], any float dtype.
            quantized: Logits of the quantized model at the same positions, same shape.
            targets: The text's next token at each position, int64 [tokens].

        Raises:
            InvalidInputError: Shapes disagree, or the original gives logits that are not finite.
            QualityGateError: The quantized model gives logits that are not finite.
        """
        if original.ndim != 2 or original.shape != quantized.shape or targets.shape != original.shape[:1]:
            raise InvalidInputError(
                f"logits {tuple(original.shape)}, {tuple(quantized.shape)} and targets "
                f"{tuple(targets.shape)} do not belong together"
            )
        if original.shape[0] == 0:
            raise InvalidInputError("a window without any position cannot be scored")
        total = 0.0
        for start in range(0, original.shape[0], self._chunk):
            rows = slice(start, start + self._chunk)
            total += self._update_chunk(original[rows], quantized[rows], targets[rows])
        self._windows.append((original.shape[0], total))

    def _update_chunk(self, original: Tensor, quantized: Tensor, targets: Tensor) -> float:
        import torch

        targets = targets.to(original.device).unsqueeze(1)
        quantized = quantized.to(original.device)
        # A logit of -inf is a token ruled out, which is fine if both models rule it out.
        ruled_out = torch.isneginf(original)
        if torch.where(ruled_out, 0.0, original).isfinite().logical_not().any():
            raise InvalidInputError(
                "the original model gives logits that are not finite", hint="Try --dtype bfloat16 or float32."
            )
        if (torch.where(ruled_out, 0.0, quantized).isfinite()).logical_not().any():
            raise QualityGateError(
                "the quantized model gives logits that are not finite",
                hint="Try --dtype bfloat16 or float32, or more bits.",
            )
        log_p = torch.log_softmax(original.float(), dim=-1)
        log_q = torch.log_softmax(quantized.float().masked_fill(ruled_out, -math.inf), dim=-1)
        difference = torch.where(ruled_out, 0.0, log_p - log_q)
        # KL is at least 0; a sum of fp32 terms of both signs may fall short of it by rounding only.
        kl = (log_p.exp() * difference).sum(dim=-1, dtype=torch.float64).clamp_min(0.0)
        self._kl_squares += float(kl.square().sum())
        self._agree += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
        self._nll_original -= float(log_p.gather(1, targets).sum(dtype=torch.float64))
        self._nll -= float(log_q.gather(1, targets).sum(dtype=torch.float64))
        return float(kl.sum())

    def result(self) -> Quality:
        """The figures over everything added so far.

        Raises:
            InvalidInputError: Nothing was added.
        """
        if not self._windows:
            raise InvalidInputError(
                "no text was scored", hint="Give an evaluation text of more than one token (--eval-text)."
            )
        tokens = sum(n for n, _ in self._windows)
        mean = sum(s for _, s in self._windows) / tokens
        return Quality(
            tokens=tokens,
            windows=len(self._windows),
            kl_mean=mean,
            kl_se=self._standard_error(mean, tokens),
            top1_agreement=self._agree / tokens,
            perplexity=_exp(self._nll / tokens),
            perplexity_original=_exp(self._nll_original / tokens),
        )

    def _standard_error(self, mean: float, tokens: int) -> float:
        count = len(self._windows)
        if count > 1:
            squares = sum((s - mean * n) ** 2 for n, s in self._windows)
            return math.sqrt(squares * count / (count - 1)) / tokens
        if tokens == 1:
            return 0.0
        variance = max(self._kl_squares / tokens - mean * mean, 0.0) * tokens / (tokens - 1)
        return math.sqrt(variance / tokens)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def windows(tokens: Sequence[int], context: int, max_tokens: int | None = None) -> Iterator[Sequence[int]]:
    """Cut a text into windows that do not overlap, the last one possibly shorter.

    The first token of each window is not scored, so a rest of one token is dropped.

    Args:
        tokens: Token ids of the whole text.
        context: Tokens per window, at least 2.
        max_tokens: Only the first so many tokens are used.

    Raises:
        InvalidInputError: `context` is below 2.
    """
    if context < 2:
        raise InvalidInputError(
            f"context {context} leaves nothing to predict", hint="Use a context of 2 or more."
        )
    end = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    for start in range(0, end, context):
        window = tokens[start : min(start + context, end)]
        if len(window) > 1:
            yield window
