"""Times the quantized linears on a GPU beside bf16 cuBLAS and other people's kernels; correctness first.

    python -m benchmarks.linear --cases b4-g64 nf4 --tokens 1 16 --tune --output FILE

Every configuration is first compiled and held against the dequantized weight
in float64, in parallel processes; a wrong one ends the run. `--tune` tries
configurations and writes the winners where `kernels/tuning` finds them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PEERS
from benchmarks.timing import copies_past_l2, graph_microseconds, machine, read_ceiling
from qcompiler.kernels.tuning.linear_cases import Case, candidates, parse_case
from qcompiler.kernels.tuning.measure import TOLERANCE, Job, check_all
from qcompiler.kernels.tuning.tables import LinearConfig, table_path, write_table

# Of Llama-3-8B and 70B: Q/K/V side by side, O, gate and up side by side, down.
SHAPES_8B = ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]
SHAPES_70B = ["10240x8192", "8192x8192", "57344x8192", "8192x28672"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=["b4-g64"], help="b4-g64, nf4, eetq, llm-int8, aqlm-2x8"
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES_8B, metavar="NxK", help="out x in features")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--repeats", type=int, default=8, help="graph replays per timing")
    parser.add_argument("--tune", action="store_true", help="try configurations, write winners as a table")
    parser.add_argument("--thorough", action="store_true", help="try more of them")
    parser.add_argument("--peers", nargs="*", default=sorted(PEERS), choices=sorted(PEERS))
    parser.add_argument("--seconds", type=float, default=600, help="start no timing after this long")
    parser.add_argument("--keep-going", action="store_true", help="leave wrong configurations out")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def right_ones(jobs: list[Job], *, keep_going: bool) -> set[Job]:
    """The jobs that can run and are right.

    Raises:
        SystemExit: One is wrong (a fast wrong kernel is no figure), unless told to keep going.
    """
    started = time.perf_counter()
    right = set()
    for job, error in check_all(jobs):
        if isinstance(error, str):
            print(f"# {job.config}: {error}", file=sys.stderr)
        elif not error < TOLERANCE:
            message = f"{job} is wrong by {error:.2e}."
            if not keep_going:
                raise SystemExit(message)
            print(f"# {message}", file=sys.stderr)
        else:
            right.add(job)
    print(f"# {len(right)} of {len(jobs)} checked in {time.perf_counter() - started:.0f} s", flush=True)
    return right


def time_shape(
    case: Case, n: int, k: int, jobs: list[Job], options: argparse.Namespace, deadline: float
) -> list[dict[str, Any]]:
    """One row per number of tokens."""
    stored = case.make(n, k, 0)
    size = sum(t.nbytes for t in stored.values())
    copies = [stored, *({a: t.clone() for a, t in stored.items()} for _ in range(copies_past_l2(size) - 1))]
    runs = [case.runner(tensors, k) for tensors in copies]
    weights = [
        torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies_past_l2(2 * n * k))
    ]
    peers: dict[str, list[Any]] = {}
    refused: dict[str, str] = {}
    for name in options.peers:
        if case.name in PEERS[name].cases:
            try:
                peers[name] = [PEERS[name].make(n, k, case.name) for _ in range(copies_past_l2(size))]
            except Exception as error:  # other people's code, which must not cost us our own figures
                refused[name] = reason(error)
    ceiling = read_ceiling(size, options.repeats)
    rows = []
    for tokens in options.tokens:
        mine = [job.config for job in jobs if job.tokens == tokens]
        if not mine or time.perf_counter() > deadline:
            continue
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
        timed = {
            config: graph_microseconds([lambda r=r, c=config, x=x: r(x, c) for r in runs], options.repeats)
            for config in mine
        }
        best = min(timed, key=lambda config: timed[config])
        dense = graph_microseconds(
            [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], options.repeats
        )
        row = {
            "case": case.name, "n": n, "k": k, "tokens": tokens, "megabytes": size / 1e6,
            "us": timed[best], "config": best.to_json() if best else None, "bf16_us": dense,
            "read_ceiling_us": ceiling, "tried": len(timed),
        }  # fmt: skip
        for name, calls in peers.items() if tokens <= 64 else ():
            try:
                row[f"{name}_us"] = graph_microseconds(
                    [lambda c=c, x=x: c(x) for c in calls], options.repeats
                )
            except Exception as error:  # it cannot be captured, or takes no such shape
                refused[name] = reason(error)
        row |= {f"{name}_refused": why for name, why in refused.items()}
        rows.append(row)
        print_row(row)
    return rows


def reason(error: Exception) -> str:
    """What a peer said when it could not be measured."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def print_row(row: dict[str, Any]) -> None:
    peers = "  ".join(
        f"{name.removesuffix('_us')} {value:.1f}"
        for name, value in row.items()
        if name.endswith("_us") and name not in ("us", "bf16_us", "read_ceiling_us")
    )
    config = " ".join(str(value) for value in (row["config"] or {}).values())
    speed = f"{row['bf16_us'] / row['us']:5.2f}x bf16  {row['read_ceiling_us'] / row['us']:5.2f} of read"
    print(
        f"{row['case']:9} {row['n']:>6}x{row['k']:<6} m{row['tokens']:<5} {row['us']:8.1f} µs  "
        f"{speed}  {peers}  {config}",
        flush=True,
    )


def write_winners(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Add the winners to the GPU's shipped tuning table."""
    entries = {}
    for row in rows:
        key = parse_case(row["case"]).key(row["n"], row["k"], row["tokens"])
        if key is not None and row["config"]:
            entries[key] = LinearConfig(**row["config"])
    path = table_path(facts["gpu"])
    write_table(path, facts["gpu"], entries, {name: facts[name] for name in ("torch", "triton", "cuda")})
    print(f"# wrote {path.name}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/linear.py needs a CUDA device; there is none here.", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + options.seconds
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    jobs: list[Job] = []
    for name in options.cases:
        case = parse_case(name)
        for n, k in shapes:
            for tokens in options.tokens:
                tried = candidates(case, tokens, n, k, thorough=options.thorough) if options.tune else []
                jobs += [Job(case, n, k, tokens, config) for config in [*tried, None]]
    right = right_ones(jobs, keep_going=options.keep_going)
    facts = machine()
    print(f"# {facts['gpu']}: copy {facts['copy_tb_per_second']:.2f} TB/s, "
          f"bf16 {facts['bf16_tflop_per_second']:.0f} TFLOP/s", flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        for n, k in shapes:
            case = parse_case(name)
            mine = [job for job in jobs if (job.case, job.n, job.k) == (case, n, k) and job in right]
            rows += time_shape(case, n, k, mine, options, deadline)
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    if options.tune:
        write_winners(rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
