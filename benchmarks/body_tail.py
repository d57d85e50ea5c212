"""Body and tail against plain hqq at equal bits per weight; writes the tables of docs/quality.md.

    python -m benchmarks.body_tail --models DIR --text FILE [--only tiny-llama]

As benchmarks/quality.py: decoder linears replaced by their dequantized weights, the model run in fp32.
Figures go to benchmarks/results/body-tail-<model>.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import RESULTS, Bench, write_between
from qcompiler.kernels.formats import get_format
from qcompiler.methods.base import get_method

BITS = (4, 3, 2)
# group size and tail fraction; tails of groups of 128 fill up to groups of 64, those of 64 up to groups of 32
ROWS = [(128, 0.0), (128, 0.0135), (64, 0.0), (64, 0.005), (64, 0.02), (64, 0.029), (32, 0.0)]


def measure(bench: Bench, bits: int, group_size: int, fraction: float) -> dict[str, Any]:
    """Quantize, run and compare; `seconds` are those of quantizing alone."""
    method = get_method("hqq")
    options = method.validate({"tail_fraction": str(fraction)})
    spec = method.resolve_spec(bits, group_size, options)
    format_ = get_format(spec.name)
    seconds, stored, digest = 0.0, 0, hashlib.sha256()
    for name, module in bench.linears.items():
        weight = bench.weights[name]
        start = time.perf_counter()
        tensors = method.quantize(weight, spec, options, name=name)
        seconds += time.perf_counter() - start
        module.weight.data = format_.dequantize(spec, tensors, weight.shape[1], torch.float32)
        stored += format_.nbytes(spec, *weight.shape)
        digest.update(module.weight.data.numpy().data)
    return {
        "bits": bits,
        "group_size": group_size,
        "tail_fraction": fraction,
        "bits_per_weight": 8 * stored / sum(weight.numel() for weight in bench.weights.values()),
        "seconds": seconds,
        **bench.quality(digest.digest()).to_json(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table, by bits per weight within each width."""
    lines = [
        "| bits | group | tail | bits per weight | perplexity | KL, nats per token | same top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (-row["bits"], round(row["bits_per_weight"], 2))):
        tail = f"{100 * row['tail_fraction']:.3g} %" if row["tail_fraction"] else "-"
        change = 100 * (row["perplexity"] / row["perplexity_original"] - 1)
        cells = (
            row["bits"],
            row["group_size"],
            tail,
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f} ({change:+.2f} %)",
            f"{row['kl_mean']:.5f} ± {row['kl_se']:.5f}",
            f"{100 * row['top1_agreement']:.2f} %",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows and write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only or ["tiny-llama", "small-llama"]:
        bench = Bench(args.models / name, args.text, args.tokens, args.context)
        rows = []
        for bits in BITS:
            for group_size, fraction in ROWS:
                rows.append(measure(bench, bits, group_size, fraction))
                print(name, bits, group_size, fraction, f"KL {rows[-1]['kl_mean']:.5f}", flush=True)
        settings = {
            "command": "python -m benchmarks.body_tail --models DIR --text FILE",
            "tokens": args.tokens,
            "context": args.context,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": rows,
        }
        path = RESULTS / f"body-tail-{name}.json"
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        write_between(f"body-tail-{name}", table(rows))


if __name__ == "__main__":
    main()
