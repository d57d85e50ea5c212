"""A decode step launched ahead, launched in order, and its CUDA graph alone; and how long loading takes.

    python -m benchmarks.decode ARTIFACT --output benchmarks/results/decode.json

`replay` is the captured step replayed by itself, which nothing on the host can beat; `ahead` is the engine as
it runs on a GPU, `in_order` the engine that reads each step's tokens before it prepares the next.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qcompiler.runtime.executor import DECODE_SIZES
from qcompiler.runtime.model import Model, load
from qcompiler.runtime.sampling import SamplingParams


def step_milliseconds(model: Model, batch: int, options: argparse.Namespace, *, ahead: bool) -> float:
    """Median over the repeats of a step's time, prompts not counted."""
    engine = model.engine
    before, engine.ahead = engine.ahead, ahead
    times = []
    try:
        for repeat in range(options.repeats + 1):
            generator = torch.Generator().manual_seed(repeat)
            prompts = torch.randint(
                0, engine.vocab_size, (batch, options.prompt_tokens), generator=generator
            ).tolist()
            params = [
                SamplingParams(
                    max_tokens=options.decode_tokens + 1,
                    ignore_eos=True,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    seed=i,
                )
                for i in range(batch)
            ]
            sequences = [engine.add(p, s) for p, s in zip(prompts, params, strict=True)]
            while not all(s.generated for s in sequences):
                engine.advance()
            done = min(len(s.generated) for s in sequences)
            start = time.perf_counter()
            engine.run(sequences)
            times.append((time.perf_counter() - start) / (options.decode_tokens + 1 - done))
    finally:
        engine.ahead = before
    return statistics.median(times[1:]) * 1e3  # the first captures graphs


def replay_milliseconds(model: Model, batch: int, repeats: int = 20) -> float | None:
    """Median time of the captured step of so many sequences; None where nothing is captured."""
    count = next((s for s in DECODE_SIZES if s >= batch), None)
    graphs = [graph for (size, _), graph in model.engine.executor._graphs.items() if size == count]
    if not graphs:
        return None
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[-1]._graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    model = load(
        options.artifact, device=options.device, verify="sizes",
        max_sequences=max(options.batches), warm_up=options.batches,
    )  # fmt: skip
    print(f"ready after {model.cold_start}", flush=True)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        row: dict[str, Any] = {"batch": batch}
        for name, ahead in (("in_order", False), ("ahead", True)):
            row[f"{name}_ms"] = step_milliseconds(model, batch, options, ahead=ahead)
        row["replay_ms"] = replay_milliseconds(model, batch)
        rows.append(row)
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    result = {
        "command": " ".join(["python -m benchmarks.decode", *sys.argv[1:]]),
        "model": options.artifact.name,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch": torch.__version__, "python": platform.python_version(),
        "cold_start": model.cold_start.to_json(), "rows": rows,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
