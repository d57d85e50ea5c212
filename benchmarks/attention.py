"""Attention on one GPU: prefill against torch's flash and cuDNN kernels, decode against the read ceiling.

Every number is preceded by a comparison with an independent result; a variant
that disagrees is reported as wrong and not timed. Times are medians of CUDA
graph replays, each graph walking through enough copies of the cache that none
of it is still in the L2.

    python -m benchmarks.attention --output benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import qcompiler.kernels.ops  # noqa: F401
from benchmarks.timing import copies_past_l2, graph_microseconds, machine, read_ceiling
from qcompiler.kernels.formats.kv_cache import kv_format
from qcompiler.kernels.kv_bits import KV_BITS, kv_format_of_bits
from qcompiler.runtime.pages import PageSpec, allocate_pages

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
    (16, 32768, 32, 8, 128),
    (64, 1024, 32, 8, 128),
    (16, 4096, 32, 32, 128),
    (16, 4096, 64, 8, 64),
]
# Cases that are repeated with a quantized cache.
QUANTIZED = [
    (1, 4096, 32, 8, 128), (1, 32768, 32, 8, 128), (16, 8192, 32, 8, 128), (16, 32768, 32, 8, 128),
    (1, 16384, 32, 32, 128), (8, 1024, 32, 8, 128), (64, 1024, 32, 8, 128),
]  # fmt: skip
PLAIN = {"window": 0, "chunk": 0, "softcap": 0.0, "sinks": None}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference relative to the largest magnitude; NaN counts as infinite."""
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    return float(error.nan_to_num(torch.inf))


class Cache:
    """A paged cache in the layout that the runtime gives it on a GPU, filled with random keys and values.

    Args:
        kv_bits: "16", "8", "4" or "fp8".
        sequences: How many.
        tokens: Of each.
        kv_heads: Key heads.
        dim: Their dimension.
        dtype: Of the keys and values before they are quantized.
        page_size: Tokens per page.
    """

    def __init__(
        self, kv_bits: str, sequences: int, tokens: int, kv_heads: int, dim: int, dtype: torch.dtype,
        page_size: int,
    ):  # fmt: skip
        name = kv_format_of_bits(kv_bits)
        self.format = None if name is None else kv_format(name)
        self.tokens, self.dim, self.dtype = tokens, dim, dtype
        width = -(-tokens // page_size)
        pages = sequences * width
        if self.format is None:
            rows = {"pages": ((kv_heads, dim), dtype)}
        else:
            rows = {
                "pages": ((kv_heads, self.format.words(dim)), torch.int16),
                "scales": (self.format.scale_row(kv_heads), self.format.scale_dtype),
            }
        specs = [PageSpec(f"{side}_{kind}_0", *row) for kind, row in rows.items() for side in "kv"]
        self.held = list(allocate_pages(specs, pages, page_size, torch.device("cuda")).values())
        self.table = torch.randperm(pages, device="cuda").view(sequences, width).to(torch.int32)
        self.lengths = torch.full((sequences,), tokens, device="cuda", dtype=torch.int32)
        self.nbytes = sequences * tokens * sum(spec.token_bytes for spec in specs)
        at = torch.arange(tokens, device="cuda")
        for s in range(sequences):
            k, v = torch.randn(2, tokens, kv_heads, dim, device="cuda", dtype=dtype)
            slots = self.table[s].long()[at // page_size] * page_size + at % page_size
            if self.format is None:
                torch.ops.qcompiler.kv_append(k, v, *self.held, slots)
            else:
                torch.ops.qcompiler.kv_append_quantized(k, v, *self.held, slots, self.format.name)

    def attend(self, q: torch.Tensor, start: torch.Tensor, longest: int) -> torch.Tensor:
        """Causal attention of q [tokens, heads, dim] at the ends of the sequences."""
        index = (self.table, start, self.lengths, longest)
        options = (self.dim**-0.5, True, *PLAIN.values())
        if self.format is None:
            return torch.ops.qcompiler.paged_attention(q, *self.held, *index, *options)
        return torch.ops.qcompiler.paged_attention_quantized(
            q, *self.held, *index, self.dim, self.format.name, *options
        )

    def dense(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [count, heads, tokens, dim] of the first sequences, as the cache holds them."""
        table = self.table[:count].long()
        parts = [held[table].flatten(1, 2)[:, : self.tokens] for held in self.held]
        if self.format is not None:
            pairs = (parts[0::2], parts[1::2])
            parts = [self.format.dequantize(*pair, self.dim).to(self.dtype) for pair in pairs]
        k, v = (part.transpose(1, 2).contiguous() for part in parts)
        return k, v


def prefill(case: tuple[int, ...], dtype: torch.dtype, replays: int, kv_bits: str) -> dict[str, object]:
    """Causal prefill of equal sequences from a freshly filled paged cache, in TFLOP/s."""
    sequences, tokens, heads, kv_heads, dim = case
    cache = Cache(kv_bits, sequences, tokens, kv_heads, dim, dtype, 64 if kv_bits == "16" else 128)
    q = torch.randn(sequences * tokens, heads, dim, device="cuda", dtype=dtype)
    start = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * tokens
    dense_q = q.view(sequences, tokens, heads, dim).transpose(1, 2).contiguous()
    dense_k, dense_v = cache.dense(sequences)

    def peer(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                dense_q, dense_k, dense_v, is_causal=True, enable_gqa=heads != kv_heads
            )

    wanted = peer(SDPBackend.FLASH_ATTENTION).transpose(1, 2).reshape(q.shape)
    flops = 2 * sequences * tokens**2 * heads * dim  # two products, half of each masked
    row: dict[str, object] = {"case": case, "kv_bits": kv_bits}
    ours = partial(cache.attend, q, start, tokens)
    error = difference(ours(), wanted)
    row["error"] = error
    if error > TOLERANCE[dtype]:
        return row | {"wrong": True}
    row["ours_tflops"] = flops / graph_microseconds([ours], replays) / 1e6
    if kv_bits != "16":
        return row
    for name, backend in PEERS.items():
        try:
            microseconds = graph_microseconds([partial(peer, backend)], replays)
            row[f"{name}_tflops"] = flops / microseconds / 1e6
        except RuntimeError as refusal:  # the backend does not take this shape
            row[f"{name}_refused"] = str(refusal).splitlines()[0]
    return row


def decode(
    case: tuple[int, ...], dtype: torch.dtype, replays: int, page_size: int, kv_bits: str
) -> dict[str, object]:
    """One token for each of several sequences: GB/s of cache read, beside the ceiling for as many bytes."""
    sequences, context, heads, kv_heads, dim = case
    q = torch.randn(sequences, heads, dim, device="cuda", dtype=dtype)
    start = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    caches = [Cache(kv_bits, sequences, context, kv_heads, dim, dtype, page_size)]
    nbytes = caches[0].nbytes
    checked = min(sequences, 2)  # in float32 more of a long context would not fit
    k, v = (t.float().repeat_interleave(heads // kv_heads, 1) for t in caches[0].dense(checked))
    wanted = F.scaled_dot_product_attention(q[:checked].float().unsqueeze(2), k, v).squeeze(2)
    del k, v
    row: dict[str, object] = {
        "case": case, "kv_bits": kv_bits, "page_size": page_size, "megabytes": nbytes / 1e6,
    }  # fmt: skip
    error = difference(caches[0].attend(q, start, 1)[:checked], wanted)
    row["error"] = error
    if error > TOLERANCE[dtype]:
        return row | {"wrong": True}
    for _ in range(copies_past_l2(nbytes) - 1):
        caches.append(copy.copy(caches[0]))
        caches[-1].held = [held.clone() for held in caches[0].held]
    ours = graph_microseconds([partial(c.attend, q, start, 1) for c in caches], replays)
    row["ours_us"] = ours
    if kv_bits == "16":
        dense = [c.dense(sequences) for c in caches]

        def peer(backend: SDPBackend, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q.unsqueeze(2), keys, values, enable_gqa=heads != kv_heads
                )

        for name, backend in PEERS.items():
            try:
                calls = [partial(peer, backend, *d) for d in dense]
                row[f"{name}_us"] = graph_microseconds(calls, replays)
            except RuntimeError as refusal:  # the backend does not take this shape
                row[f"{name}_refused"] = str(refusal).splitlines()[0]
        del dense
    del caches
    ceiling = read_ceiling(nbytes, replays)
    return row | {"ours_gbps": nbytes / ours / 1e3, "ceiling_us": ceiling, "of_ceiling": ceiling / ours}


def over_plain(rows: list[dict[str, object]], figure: str, *, higher_is_faster: bool) -> None:
    """Tell how much faster each row is than that of the plain cache for the same case."""
    plain = {str(r["case"]): r for r in rows if r["kv_bits"] == "16"}
    for row in rows:
        base = plain.get(str(row["case"]), {})
        if row["kv_bits"] != "16" and figure in row and figure in base:
            ratio = float(str(row[figure])) / float(str(base[figure]))
            row["over_plain"] = ratio if higher_is_faster else 1 / ratio


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the JSON; standard output otherwise")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument(
        "--page-size", type=int, help="of the decode cases; default: the runtime's, 64, quantized 128"
    )
    parser.add_argument("--kv-bits", nargs="+", choices=list(KV_BITS), default=["16", "8", "4"])
    parser.add_argument("--replays", type=int, default=20)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py needs a CUDA device; there is none here.")
    dtype = getattr(torch, options.dtype)
    facts = machine()
    prefilled: list[dict[str, object]] = []
    decoded: list[dict[str, object]] = []
    for kv_bits in options.kv_bits:
        chosen = [PREFILL, DECODE]
        page_size = options.page_size or 64
        if kv_bits != "16":
            chosen = [[case for case in cases if case in QUANTIZED] for cases in chosen]
            page_size = options.page_size or 128
        prefilled += [prefill(case, dtype, options.replays, kv_bits) for case in chosen[0]]
        decoded += [decode(case, dtype, options.replays, page_size, kv_bits) for case in chosen[1]]
    over_plain(prefilled, "ours_tflops", higher_is_faster=True)
    over_plain(decoded, "ours_us", higher_is_faster=False)
    result: dict[str, object] = {
        "machine": facts,
        "dtype": options.dtype,
        "prefill": prefilled,
        "decode": decoded,
    }
    text = json.dumps(result, indent=1)
    if options.output is None:
        sys.stdout.write(text + "\n")
    else:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
