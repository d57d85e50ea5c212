"""A plain streaming read, the ceiling of every weight-bound kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stream_read(source, out, count, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program reads STEPS blocks and writes one word, so that no load can be dropped."""
    start = tl.program_id(0) * BLOCK * STEPS
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in tl.static_range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        total ^= tl.load(source + at, mask=at < count, other=0, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.sum(total))
