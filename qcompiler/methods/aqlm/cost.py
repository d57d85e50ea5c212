"""How long AQLM takes on a block: work counted from shapes, times rates measured here on small samples.

With N×K a linear, G = K/d its groups, M codebooks of C codewords, T tokens of text and R rounds:

- moments: gram and cross, 4·T·K² flops for each input, and both streams run up to it;
- metric: factorizations of each input's Gram matrix in float64, 4/3·K³ flops, and per linear
  1/3·K³ + 4·N·K² for the corrected weight;
- k-means: M·(rounds + 1)·P·C distances over P sampled groups;
- codes: 2 passes with error feedback, R − 1 of descent, each G steps one after the other: a search for N
  rows and an update of the N·K targets (of half of them on average with feedback);
- codebooks: R·(conjugate gradients + 4) products of N×K with the Gram matrix and sums over all groups;
- tuning: forward and backward, 6·N·K flops for each token and epoch, and the weights built from codes
  and their gradient summed by codeword, once a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qcompiler.kernels.formats.additive import AdditiveSpec
from qcompiler.methods.aqlm.codebooks import nearest
from qcompiler.methods.aqlm.finetune import FinetuneSettings
from qcompiler.methods.aqlm.layer import LayerSettings
from qcompiler.methods.aqlm.phases import PHASES
from qcompiler.methods.aqlm.search import Metric, choose_codes, sum_codewords
from qcompiler.methods.aqlm.sums import sums_of

_CONJUGATE_GRADIENTS = 16
_KMEANS_POINTS = 1 << 15
# How much longer a phase takes than the work counted above: attention, norms, bookkeeping. Measured with
# benchmarks/aqlm_block.py on one CPU core, blocks of 256 and 512 features.
_OVER_COUNTED = {
    "moments": 1.6, "metric": 0.6, "k-means": 1.0, "codes": 1.1, "codebooks": 1.0, "tuning": 1.6,
}  # fmt: skip

# (out_features, in_features, spec) of the linears that share an input.
Stage = Sequence[tuple[int, int, AdditiveSpec]]


@dataclass(frozen=True)
class Rates:
    """Seconds on a device; of one spec where the search is concerned.

    Attributes:
        flop: Per float32 flop of a matrix product.
        flop64: Per float64 flop of a factorization.
        distance: Per point and codeword in k-means.
        step: Of a search for no rows: what the calls of one step of a pass cost.
        row: Per row of a search.
        update: Per element of a step's update of the targets.
        gather: Per codeword looked up, or summed up to.
    """

    flop: float
    flop64: float
    distance: float
    step: float
    row: float
    update: float
    gather: float


def measure_rates(spec: AdditiveSpec, beam: int, device: torch.device) -> Rates:
    """Time samples of each kind of work; under a second on a GPU, a few on a CPU."""
    on_gpu = device.type == "cuda"
    size, rows = (4096, 4096) if on_gpu else (512, 256)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    matrix = random(size, size)
    books = random(spec.codebooks, spec.codewords, spec.group_size)
    points = random(rows, spec.group_size)
    gram = matrix @ matrix.T / size
    codes = torch.randint(
        spec.codewords, (rows, size // spec.group_size, spec.codebooks), generator=generator
    ).to(device)
    groups, columns = points[:1], random(spec.group_size, size)
    error = random(rows, spec.group_size)
    targets = random(rows, size)
    sums = sums_of(codes, spec.codewords)
    values = random(codes.shape[0] * codes.shape[1], spec.group_size)

    def timed(work: Callable[[], object]) -> float:
        return _seconds(work, device)

    step = timed(lambda: choose_codes(groups, books, beam))
    return Rates(
        flop=timed(lambda: matrix @ matrix) / (2 * size**3),
        flop64=timed(lambda: Metric(gram, spec.group_size)) / (4 / 3 * size**3),
        distance=timed(lambda: nearest(points, books[0])) / (rows * spec.codewords),
        step=step,
        row=max(0.0, timed(lambda: choose_codes(points, books, beam)) - step) / rows,
        update=timed(lambda: targets.addmm_(error, columns, alpha=1e-3)) / targets.numel(),
        gather=timed(lambda: (sum_codewords(books, codes), [one(values) for one in sums]))
        / (2 * codes.numel()),
    )


def block_seconds(
    stages: Sequence[Stage],
    rates_of: Callable[[AdditiveSpec], Rates],
    settings: LayerSettings,
    tuning: FinetuneSettings,
    windows: int,
    context: int,
) -> dict[str, float]:
    """Seconds by phase of a block; see the top of this file."""
    seconds = dict.fromkeys(PHASES, 0.0)
    tokens = windows * context
    feedback, descents = min(settings.rounds, settings.feedback_rounds), max(0, settings.rounds - 1)
    steps = -(-windows // tuning.batch) * tuning.epochs
    before = 0  # weights of the linears in front
    for stage in stages:
        for index, (n, k, spec) in enumerate(stage):
            rates, groups = rates_of(spec), -(-k // spec.group_size)
            if index == 0:
                seconds["moments"] += (4 * k**2 + 4 * before) * tokens * rates.flop
                seconds["metric"] += 4 / 3 * k**3 * rates.flop64
            seconds["metric"] += (k**3 / 3 + 4 * n * k**2) * rates.flop64
            points = min(n * groups, max(_KMEANS_POINTS, 8 * spec.codewords))
            # With a codeword for every group there is nothing to improve after the first round.
            steps_each = settings.kmeans_steps if points > spec.codewords else 1
            rounds = spec.codebooks * (steps_each + 1)
            seconds["k-means"] += rounds * points * spec.codewords * rates.distance
            passes = feedback + descents
            seconds["codes"] += passes * groups * (rates.step + n * rates.row)
            seconds["codes"] += (feedback / 2 + descents) * groups * n * k * rates.update
            looked_up = n * groups * spec.codebooks
            products = settings.rounds * (_CONJUGATE_GRADIENTS + 4)
            seconds["codebooks"] += products * (2 * n * k**2 * rates.flop + 2 * looked_up * rates.gather)
            # Also once for the targets, and the error of the first windows before and after.
            measured = windows + 2 * min(16, windows)
            flops = 2 * n * k * context * (3 * windows * tuning.epochs + measured)
            seconds["tuning"] += flops * rates.flop + 2 * steps * looked_up * rates.gather
            searched = tuning.code_updates * tuning.code_share * n * groups
            seconds["tuning"] += searched * rates.row
        before += sum(n * k for n, k, _ in stage)
    return {name: value * _OVER_COUNTED[name] for name, value in seconds.items()}


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    best = float("inf")
    for attempt in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return best
