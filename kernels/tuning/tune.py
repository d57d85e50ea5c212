"""Chooses configurations for the linears of a model by measuring them, weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcompiler.kernels.tuning.linear_cases import Case, candidates
from qcompiler.kernels.tuning.measure import TOLERANCE, Job, check_all, time_configs
from qcompiler.kernels.tuning.tables import LinearConfig

# A configuration must be this much faster than what runs unasked: less is noise.
_GAIN = 0.98


@dataclass(frozen=True)
class Weight:
    """A linear of the model: format, out_features, in_features."""

    case: Case
    n: int
    k: int


@dataclass(frozen=True)
class Choice:
    """What was measured for one weight and one number of tokens.

    Attributes:
        weight: The linear.
        tokens: Tokens.
        key: Of the table's entry.
        config: The fastest, or None where what runs unasked is as fast.
        us: Its time, microseconds.
        unasked_us: Of what runs unasked: an entry that is in a table already, or what is sane.
        tried: Configurations that were timed.
        wrong: Configurations left out because their results were wrong.
    """

    weight: Weight
    tokens: int
    key: str
    config: LinearConfig | None
    us: float
    unasked_us: float
    tried: int
    wrong: int


@dataclass(frozen=True)
class Gpu:
    """How configurations are checked and timed; tests put their own in place of it."""

    check: Callable[[Sequence[Job]], Iterator[tuple[Job, float | str]]] = check_all
    time: Callable[[Case, int, int, Iterable[Job]], Iterator[tuple[Job, float]]] = time_configs


def tune(
    weights: Sequence[Weight],
    tokens: Sequence[int],
    *,
    thorough: bool = False,
    gpu: Gpu | None = None,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _all: None,
) -> Iterator[list[Choice]]:
    """Measure; gives the choices of one weight at a time, so that what is finished can be kept.

    Args:
        weights: Distinct linears.
        tokens: Numbers of tokens; one is measured for each power of two that they round up to.
        thorough: Try more configurations.
        gpu: How to measure.
        progress: Told what is done, how much of it, and of how much.
    """
    gpu = gpu or Gpu()
    planned: dict[Weight, list[Job]] = {}
    for weight in weights:
        case, n, k = weight.case, weight.n, weight.k
        planned[weight] = [
            Job(case, n, k, count, config)
            for count in tokens
            if case.key(n, k, count) is not None
            for config in [None, *candidates(case, count, n, k, thorough=thorough)]
        ]
    everything = [job for jobs in planned.values() for job in jobs]
    errors: dict[Job, float | str] = {}
    for job, error in gpu.check(everything):
        errors[job] = error
        progress("checking", len(errors), len(everything))
    # The unasked one is what runs anyway: it is timed even if it cannot be said to be right.
    right = {job for job in everything if job.config is None or _is_right(errors[job])}
    timed = 0
    for weight, jobs in planned.items():
        times: dict[Job, float] = {}
        for job, us in gpu.time(weight.case, weight.n, weight.k, [job for job in jobs if job in right]):
            times[job] = us
            timed += 1
            progress("timing", timed, len(right))
        yield [_choose(weight, count, times, errors) for count in dict.fromkeys(job.tokens for job in jobs)]


def _choose(weight: Weight, tokens: int, times: dict[Job, float], errors: dict[Job, float | str]) -> Choice:
    mine = {job: us for job, us in times.items() if job.tokens == tokens}
    unasked = next(us for job, us in mine.items() if job.config is None)
    best = min(mine, key=lambda job: mine[job])
    faster = mine[best] < _GAIN * unasked
    key = weight.case.key(weight.n, weight.k, tokens)
    if key is None:
        raise ValueError(f"{weight.case.name} has no table")
    same = (weight.case, weight.n, weight.k, tokens)
    of_weight = [e for j, e in errors.items() if (j.case, j.n, j.k, j.tokens) == same]
    return Choice(
        weight,
        tokens,
        key,
        best.config if faster else None,
        mine[best] if faster else unasked,
        unasked,
        len(mine),
        sum(isinstance(error, float) and not error < TOLERANCE for error in of_weight),
    )


def _is_right(error: float | str) -> bool:
    return isinstance(error, float) and error < TOLERANCE
