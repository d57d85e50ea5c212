"""Quality of `--target-bpw` against uniform choices of the same size, on trained models in fp32.

    python -m benchmarks.auto --models DIR --text FILE --calib-text FILE [--only tiny-llama]

Sensitivities are measured once per model; then each target, and each uniform choice that is compared with, is
quantized and measured as `qcompile` does it. Writes benchmarks/results/auto-<model>.json and the tables
between the markers of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import RESULTS, write_between
from qcompiler.allocation.allocate import budget_of, find_problem
from qcompiler.allocation.problem import Problem
from qcompiler.calibration.runner import MemoryStore
from qcompiler.options import CompileOptions
from qcompiler.pipeline import quantize_plan
from qcompiler.plan import CompilePlan, make_plan, plan_layers
from qcompiler.progress import Progress
from qcompiler.sizes import Sizes

TARGETS = (3.0, 2.5, 3.5, 4.25)
UNIFORM = ("gptq 2 g32", "aqlm 2x8 g8", "gptq 3 g64", "gptq 4 g128")


def plan_for(model: Path, args: Any, target: float) -> CompilePlan:
    return make_plan(
        CompileOptions(
            model=str(model),
            method=args.method,
            target_bpw=target,
            device=args.device,
            dtype="float32",
            eval_text=args.text,
            eval_tokens=args.eval_tokens,
            calib_text=args.calib_text,
            calib_tokens=args.calib_tokens,
        )
    )


def measured(plan: CompilePlan, label: str, predicted: float) -> dict[str, Any]:
    """Quantize a plan and keep the figures."""
    started = time.perf_counter()
    _, quality = quantize_plan(plan, MemoryStore(), Progress())
    assert quality is not None
    row = {
        "label": label,
        "bits_per_weight_linears": Sizes(plan).bits_per_weight_linears,
        "predicted": predicted,
        "seconds": round(time.perf_counter() - started, 1),
        **quality.to_json(),
    }
    print(
        label,
        f"{row['bits_per_weight_linears']:.3f}",
        f"KL {quality.kl_mean:.5f}",
        row["seconds"],
        flush=True,
    )
    return row


def auto_row(plan: CompilePlan, problem: Problem) -> dict[str, Any]:
    chosen = problem.solve(budget_of(plan, problem))
    label = f"{plan.options.method} at {plan.options.target_bpw:g}"
    row = measured(plan_layers(plan, problem.specs(chosen)), label, problem.cost(chosen))
    return {**row, "choices": problem.labels(chosen)}


def uniform_row(plan: CompilePlan, problem: Problem, label: str) -> dict[str, Any]:
    spec = problem.candidates[label].spec
    names = [layer.name for group in problem.groups for layer in group.layers]
    predicted = {name: cost for name, _, cost in problem.uniform()}[label]
    return measured(plan_layers(plan, dict.fromkeys(names, spec)), f"uniform {label}", predicted)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows by size as a markdown table."""
    lines = [
        f"Original perplexity {rows[0]['perplexity_original']:.3f}; {rows[0]['tokens']} scored tokens.",
        "",
        "| choice | bits per weight | perplexity | KL, nats per token | predicted | same top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for item in sorted(rows, key=lambda row: (row["bits_per_weight_linears"], row["label"])):
        change = 100 * (item["perplexity"] / item["perplexity_original"] - 1)
        cells = (
            item["label"],
            f"{item['bits_per_weight_linears']:.3f}",
            f"{item['perplexity']:.3f} ({change:+.2f} %)",
            f"{item['kl_mean']:.5f} ± {item['kl_se']:.5f}",
            f"{item['predicted']:.5f}",
            f"{100 * item['top1_agreement']:.2f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows and write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calib-text", type=Path, required=True)
    parser.add_argument("--calib-tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="auto", help="auto, or one method whose formats are chosen from")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--uniform", nargs="+", default=UNIFORM)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    for name in args.only or ["tiny-llama", "small-llama"]:
        plan = plan_for(args.models / name, args, args.targets[0])
        started = time.perf_counter()
        problem = find_problem(plan, MemoryStore(), Progress())
        seconds = round(time.perf_counter() - started, 1)
        print(name, "sensitivities", seconds, flush=True)
        rows: list[dict[str, Any]] = []
        work = [("auto", target) for target in args.targets] + [("uniform", label) for label in args.uniform]
        for kind, item in work:
            if kind == "auto":
                rows.append(auto_row(plan_for(args.models / name, args, item), problem))
            else:
                rows.append(uniform_row(plan, problem, item))
            settings = {
                "command": "python -m benchmarks.auto --models DIR --text FILE --calib-text FILE",
                "calib_tokens": args.calib_tokens,
                "device": str(plan.device),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "seconds_sensitivities": seconds,
                "uniform_predicted": problem.uniform(),
                "rows": rows,
            }
            path = RESULTS / f"auto-{name}.json"
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            write_between(f"auto-{name}", table(rows))


if __name__ == "__main__":
    main()
