"""Speed of a loaded decoder: prefill and decode tokens per second, by the number of sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.model import Model
from qcompiler.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class BenchRow:
    """Speed at one number of sequences; tokens per second over all of them, medians over the repeats."""

    batch: int
    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dict(vars(self))


def bench(
    model: Model,
    *,
    batches: tuple[int, ...] = (1, 4, 16),
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Measure a decoder.

    Args:
        model: What to measure.
        batches: Numbers of sequences.
        prompt_tokens: Tokens of each prompt.
        decode_tokens: Tokens generated for each.
        repeats: Runs per row; one more warms up.
        progress: Called with what is being measured.

    Raises:
        InvalidInputError: sizes that do not fit the model.
    """
    engine = model.engine
    if min(prompt_tokens, decode_tokens, repeats, *batches) < 1:
        raise InvalidInputError("batch sizes, token counts and repeats must be at least 1")
    if prompt_tokens + decode_tokens + 1 > model.max_context:
        raise InvalidInputError(
            f"{prompt_tokens} prompt and {decode_tokens} generated tokens exceed "
            f"the context of {model.max_context}"
        )
    if max(batches) > engine.max_sequences:
        raise InvalidInputError(
            f"batch {max(batches)} is more than the {engine.max_sequences} sequences that run at once",
            hint="Load the model with a larger max_sequences.",
        )
    rows = []
    for batch in batches:
        if progress is not None:
            progress(f"batch {batch}")
        prefill, decode = [], []
        for run in range(repeats + 1):
            seconds = _one_run(model, batch, prompt_tokens, decode_tokens, seed=run)
            if run > 0:
                prefill.append(batch * prompt_tokens / seconds[0])
                decode.append(batch * decode_tokens / seconds[1])
        rows.append(
            BenchRow(
                batch, prompt_tokens, decode_tokens, statistics.median(prefill), statistics.median(decode)
            )
        )
    return rows


def _one_run(
    model: Model, batch: int, prompt_tokens: int, decode_tokens: int, seed: int
) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and for `decode_tokens` more each."""
    engine = model.engine
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, engine.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    params = SamplingParams(max_tokens=decode_tokens + 1, ignore_eos=True)
    start = time.perf_counter()
    sequences = [engine.add(p, params) for p in prompts]
    try:
        while any(len(s.generated) == 0 for s in sequences):
            engine.advance()
        middle = time.perf_counter()
        done = sum(len(s.generated) - 1 for s in sequences)
        engine.run(sequences)
        end = time.perf_counter()
    finally:
        for sequence in sequences:
            engine.abort(sequence)
    # A prompt that is taken in pieces lets others decode meanwhile; count only what came afterwards.
    share = 1 - done / (batch * decode_tokens)
    return middle - start, (end - middle) / share
