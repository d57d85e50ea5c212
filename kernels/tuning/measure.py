"""Checks and times configurations of one linear on the GPU that is there: right first, then fast.

A configuration is compiled and held against the dequantized weight in parallel
processes, which fills Triton's cache; those that are right are then timed one
after another in this one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qcompiler.kernels.tuning.linear_cases import Case
from qcompiler.kernels.tuning.tables import LinearConfig
from qcompiler.kernels.tuning.timing import copies_past_l2, graph_microseconds

# Rounding of weights, scales and the result to bfloat16; int8 activations besides, in LLM.int8().
TOLERANCE = 0.02
_MOST_WORKERS = 14
# A worker's context, and per weight: codes while they are made, the dense weight in float32.
_WORKER_BYTES = 1 << 30
_WEIGHT_BYTES = 16


@dataclass(frozen=True)
class Job:
    """A configuration for a number of tokens of a linear [n, k]; None is what would be chosen unasked."""

    case: Case
    n: int
    k: int
    tokens: int
    config: LinearConfig | None


_held: dict[tuple[Case, int, int], Any] = {}


def check(job: Job) -> tuple[Job, float | str]:
    """Relative error of one configuration, or why it cannot run; compiles it into the cache on the way."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    weight_key = (job.case, job.n, job.k)
    if weight_key not in _held:
        _held.clear()
        tensors = job.case.make(job.n, job.k, 0)
        _held[weight_key] = job.case.runner(tensors, job.k), job.case.dense(tensors, job.k)
    run, weight = _held[weight_key]
    x = torch.randn(job.tokens, job.k, dtype=job.case.dtype, device="cuda")
    wanted = x.float() @ weight.T
    try:
        y = run(x, job.config)
    except (OutOfResources, PTXASError, CompilationError) as error:
        return job, str(error)
    return job, float((y.float() - wanted).norm() / wanted.norm())


def _check_some(jobs: Sequence[Job]) -> list[tuple[Job, float | str]]:
    """Neighbours by one worker, which holds their weight."""
    return [check(job) for job in jobs]


def _begin() -> None:
    """An interrupt is for the process that the user started; it ends these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_all(jobs: Sequence[Job], chunk: int = 3) -> Iterator[tuple[Job, float | str]]:
    """`check` of every job, in parallel processes, as they finish."""
    if not jobs:
        return
    largest = max(job.n * job.k for job in jobs)
    free, _ = torch.cuda.mem_get_info()
    room = int(free * 0.8) // (_WORKER_BYTES + _WEIGHT_BYTES * largest)
    workers = max(1, min(_MOST_WORKERS, os.cpu_count() or 1, room, -(-len(jobs) // chunk)))
    context = multiprocessing.get_context("spawn")
    # Not a `Pool`: that waits for ever for a worker which the system has killed, this raises.
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        parts = [pool.submit(_check_some, jobs[i : i + chunk]) for i in range(0, len(jobs), chunk)]
        for part in as_completed(parts):
            yield from part.result()
    finally:
        pool.shutdown(cancel_futures=True)


def time_configs(
    case: Case, n: int, k: int, jobs: Iterable[Job], repeats: int = 8
) -> Iterator[tuple[Job, float]]:
    """µs of each job of one weight, medians of CUDA-graph replays with copies of it rotated past the L2."""
    stored = case.make(n, k, 0)
    size = sum(t.nbytes for t in stored.values())
    copies = [stored, *({a: t.clone() for a, t in stored.items()} for _ in range(copies_past_l2(size) - 1))]
    runs = [case.runner(tensors, k) for tensors in copies]
    for job in jobs:
        x = torch.randn(job.tokens, k, dtype=case.dtype, device="cuda")
        yield job, graph_microseconds([partial(run, x, job.config) for run in runs], repeats)
