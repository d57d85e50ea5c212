"""Attention on one GPU: prefill against torch's flash and cuDNN kernels, decode against the read ceiling.

Every number is preceded by a comparison with an independent result; a variant
that disagrees is reported as wrong and not timed. Times are medians of CUDA
graph replays, each graph walking through enough copies of the cache that none
of it is still in the L2.

    python benchmarks/attention.py --output attention.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

import qcompiler.kernels.ops  # noqa: F401

PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# relative to the largest magnitude of the result: 16-bit inputs and weights of the second product
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
PREFILL = [  # sequences, tokens, query heads, key heads, head dimension
    (1, 512, 32, 8, 128),
    (1, 2048, 32, 8, 128),
    (1, 4096, 32, 8, 128),
    (1, 16384, 32, 32, 128),
    (8, 1024, 32, 8, 128),
    (1, 4096, 32, 32, 64),
    (1, 4096, 16, 8, 256),
]
DECODE = [  # sequences, context, query heads, key heads, head dimension
    (1, 512, 32, 8, 128),
    (1, 4096, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (16, 8192, 32, 8, 128),
    (64, 1024, 32, 8, 128),
    (16, 4096, 32, 32, 128),
    (16, 4096, 64, 8, 64),
]
PLAIN = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None}


@triton.jit
def read_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """Read everything once; the store never happens but keeps the loads alive."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * ROUNDS
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for r in tl.static_range(ROUNDS):
        at = start + r * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < count, other=0)
    if tl.sum(total) == 0x7FFFFFF1:
        tl.store(out_ptr, 1)


def milliseconds(calls: list[Callable[[], object]], replays: int) -> float:
    """Median time of one call, over replays of a graph that makes all of them in turn."""
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
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


def copies_past_l2(nbytes: int) -> int:
    """Copies of a working set that together are three times the L2, at most 64."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-3 * l2 // nbytes)))


def read_ceiling(nbytes: int, replays: int) -> float:
    """Fastest plain read of as many bytes, in milliseconds."""
    words = nbytes // 4
    buffers = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(copies_past_l2(nbytes))]
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")

    def timed(block: int, rounds: int, warps: int) -> float:
        grid = (triton.cdiv(words, block * rounds),)

        calls: list[Callable[[], object]] = [
            partial(read_kernel[grid], b, flag, words, block, rounds, num_warps=warps) for b in buffers
        ]
        return milliseconds(calls, replays)

    return min(timed(*c) for c in ((1024, 4, 4), (2048, 4, 4), (2048, 8, 8), (4096, 4, 8), (4096, 8, 8)))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference relative to the largest magnitude; NaN counts as infinite."""
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    return float(error.nan_to_num(torch.inf))


def prefill(case: tuple[int, ...], dtype: torch.dtype, replays: int) -> dict[str, object]:
    """Causal prefill of equal sequences from a freshly filled paged cache, in TFLOP/s."""
    sequences, tokens, heads, kv_heads, dim = case
    page_size = 64
    pages = tokens // page_size
    q = torch.randn(sequences * tokens, heads, dim, device="cuda", dtype=dtype)
    k = torch.randn(sequences * pages, page_size, kv_heads, dim, device="cuda", dtype=dtype)
    v = torch.randn_like(k)
    order = torch.randperm(sequences * pages, device="cuda")
    table = order.view(sequences, pages).to(torch.int32)
    start = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * tokens
    lengths = torch.full((sequences,), tokens, device="cuda", dtype=torch.int32)
    dense_q = q.view(sequences, tokens, heads, dim).transpose(1, 2).contiguous()
    dense_k, dense_v = (
        t[order].view(sequences, tokens, kv_heads, dim).transpose(1, 2).contiguous() for t in (k, v)
    )

    def ours() -> torch.Tensor:
        return torch.ops.qcompiler.paged_attention(
            q, k, v, table, start, lengths, tokens, dim**-0.5, True, *PLAIN.values()
        )

    def peer(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                dense_q, dense_k, dense_v, is_causal=True, enable_gqa=heads != kv_heads
            )

    wanted = peer(SDPBackend.FLASH_ATTENTION).transpose(1, 2).reshape(q.shape)
    flops = 2 * sequences * tokens**2 * heads * dim  # two products, half of each masked
    row: dict[str, object] = {"case": case}
    row["error"] = difference(ours(), wanted)
    if float(str(row["error"])) > TOLERANCE[dtype]:
        return row | {"wrong": True}
    row["ours_tflops"] = flops / milliseconds([ours], replays) / 1e9
    for name, backend in PEERS.items():
        try:
            row[f"{name}_tflops"] = flops / milliseconds([partial(peer, backend)], replays) / 1e9
        except RuntimeError as error:  # the backend does not take this shape
            row[f"{name}_refused"] = str(error).splitlines()[0]
    return row


def decode(case: tuple[int, ...], dtype: torch.dtype, replays: int, page_size: int) -> dict[str, object]:
    """One token for each of several sequences: GB/s of cache read, beside the ceiling for as many bytes."""
    sequences, context, heads, kv_heads, dim = case
    nbytes = 2 * sequences * context * kv_heads * dim * dtype.itemsize
    pages = context // page_size
    q = torch.randn(sequences, heads, dim, device="cuda", dtype=dtype)
    start = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((sequences,), context, device="cuda", dtype=torch.int32)
    table = torch.randperm(sequences * pages, device="cuda").view(sequences, pages).to(torch.int32)
    caches = [
        torch.randn(2, sequences * pages, page_size, kv_heads, dim, device="cuda", dtype=dtype)
        for _ in range(copies_past_l2(nbytes))
    ]

    def ours(cache: torch.Tensor) -> torch.Tensor:
        return torch.ops.qcompiler.paged_attention(
            q, cache[0], cache[1], table, start, lengths, 1, dim**-0.5, True, *PLAIN.values()
        )

    def peer(backend: SDPBackend, dense: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q.unsqueeze(2), dense[0], dense[1], enable_gqa=heads != kv_heads
            )

    def densify(cache: torch.Tensor) -> torch.Tensor:
        gathered = cache[:, table.long()].reshape(2, sequences, context, kv_heads, dim)
        return gathered.transpose(2, 3).contiguous()

    first = densify(caches[0]).float()
    wanted = F.scaled_dot_product_attention(
        q.float().unsqueeze(2), *(t.repeat_interleave(heads // kv_heads, 1) for t in first)
    ).squeeze(2)
    del first
    row: dict[str, object] = {"case": case, "page_size": page_size, "megabytes": nbytes / 1e6}
    row["error"] = difference(ours(caches[0]), wanted)
    if float(str(row["error"])) > TOLERANCE[dtype]:
        return row | {"wrong": True}
    calls: list[Callable[[], object]] = [partial(ours, c) for c in caches]
    row["ours_us"] = 1e3 * (ours_ms := milliseconds(calls, replays))
    dense = [densify(cache) for cache in caches]
    for name, backend in PEERS.items():
        try:
            row[f"{name}_us"] = 1e3 * milliseconds([partial(peer, backend, d) for d in dense], replays)
        except RuntimeError as error:  # the backend does not take this shape
            row[f"{name}_refused"] = str(error).splitlines()[0]
    del dense, caches
    ceiling_ms = read_ceiling(nbytes, replays)
    return row | {
        "ours_gbps": nbytes / ours_ms / 1e6,
        "ceiling_us": 1e3 * ceiling_ms,
        "of_ceiling": ceiling_ms / ours_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON; standard output otherwise")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16, help="of the decode cases")
    parser.add_argument("--replays", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    dtype = getattr(torch, options.dtype)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": options.dtype,
        "prefill": [prefill(case, dtype, options.replays) for case in PREFILL],
        "decode": [decode(case, dtype, options.replays, options.page_size) for case in DECODE],
    }
    text = json.dumps(result, indent=1)
    if options.output is None:
        sys.stdout.write(text + "\n")
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
