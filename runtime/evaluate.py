"""Perplexity of a text: exp of the mean negative log-likelihood per token.

Protocol: the whole text is encoded once without special tokens, cut into
windows of the context length that do not overlap, and each window is scored
alone; the first token of a window has no context and is not scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.model import Model


@dataclass(frozen=True)
class Perplexity:
    """Result of an evaluation.

    Attributes:
        perplexity: exp(nll).
        nll: Mean negative log-likelihood of the scored tokens, in nats.
        tokens: Tokens in the windows, unscored first ones included.
        seconds: Time taken, tokenization aside.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float


def evaluate(
    model: Model,
    text: str,
    *,
    context: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `text` under a decoder.

    Args:
        model: A loaded decoder.
        text: The text.
        context: Tokens per window, at least 2.
        max_tokens: Use only the text's first tokens.
        progress: Called with (tokens done, tokens in all).

    Raises:
        InvalidInputError: the context does not fit the model, or the text is too short.
    """
    if type(context) is not int or not 2 <= context <= model.max_context:
        raise InvalidInputError(f"context must be in [2, {model.max_context}] for this model, not {context}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 2):
        raise InvalidInputError(f"max_tokens must be at least 2, not {max_tokens}")
    tokens = model.tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    if len(tokens) < 2:
        raise InvalidInputError(f"a text of {len(tokens)} tokens is too short to score")
    windows = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    start = time.perf_counter()
    total, scored, done = 0.0, 0, 0
    for index, first, logits in model.engine.score(windows):
        # Row i predicts the token after it; a window's last row predicts nothing that is scored.
        targets = windows[index][first + 1 : first + 1 + logits.shape[0]]
        if targets:
            wanted = torch.tensor(targets, device=logits.device)
            losses = torch.nn.functional.cross_entropy(
                logits[: len(targets)].float(), wanted, reduction="none"
            )
            total += float(losses.double().sum())
            scored += len(targets)
        done += logits.shape[0]
        if progress is not None:
            progress(done, len(tokens))
    nll = total / scored
    return Perplexity(math.exp(nll) if nll < 700 else math.inf, nll, len(tokens), time.perf_counter() - start)
