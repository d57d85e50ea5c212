"""Times GPU work as it runs in practice: CUDA graphs in which the weights rotate past the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

L2_BYTES = 160 << 20  # rotate over more than two and a half times the largest L2 at hand


def graph_microseconds(calls: list[Callable[[], Any]], repeats: int = 10) -> float:
    """Median time of one call in µs; all calls (one per rotated copy) stand in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


def copies_past_l2(nbytes: int) -> int:
    """How many copies of a weight make a rotation that no cache holds."""
    return max(2, -(-L2_BYTES // nbytes))
