"""`torch.compile` with backend "qcompiler" beside plain inductor, on a llama of transformers.

    python -m benchmarks.backend --shape llama3-8b --layers 32 --output benchmarks/results/backend.json

Random bfloat16 weights on one GPU, no KV cache: one step over `tokens` tokens, so that few tokens show
what reading the weights costs, and many what computing costs. Milliseconds are medians between CUDA
events, after warm-up. Graph breaks are Dynamo's own count, of every run together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.checkpoint import SHAPES
from benchmarks.timing import machine
from qcompiler.backend import Backend
from qcompiler.backend.weights import WEIGHTS

# name → what is given to torch.compile; None is the eager model.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "inductor, CUDA graphs": {"backend": "inductor", "mode": "reduce-overhead"},
    "qcompiler": {"options": {}},
    "qcompiler, unfused": {"options": {"fuse": False}},
    "qcompiler, CUDA graphs": {"options": {"mode": "reduce-overhead"}},
    "qcompiler, unfused, CUDA graphs": {"options": {"fuse": False, "mode": "reduce-overhead"}},
}


def make_model(shape: str, layers: int | None, device: str) -> torch.nn.Module:
    """A llama with random weights on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()


def milliseconds(run: Any, ids: torch.Tensor, repeats: int) -> float:
    """Median time of one step."""
    for _ in range(5):
        run(ids, use_cache=False)
    times = []
    if ids.device.type == "cpu":
        for _ in range(repeats):
            started = time.perf_counter()
            run(ids, use_cache=False)
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(ids, use_cache=False)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(
    model: torch.nn.Module, variant: dict[str, Any] | None, args: argparse.Namespace
) -> dict[str, Any]:
    """Times of a variant by number of tokens, and how far its logits are from the eager model's."""
    torch._dynamo.reset()
    WEIGHTS.clear()
    run: Any = model
    if variant is not None and "options" in variant:
        backend = Backend(method=args.method, bits=args.bits, **variant["options"])
        run = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    elif variant is not None:
        run = torch.compile(model, dynamic=False, fullgraph=True, **variant)
    result: dict[str, Any] = {"ms": {}}
    for tokens in args.tokens:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=args.device)
        wanted = model(ids, use_cache=False).logits.float()
        result["ms"][tokens] = round(milliseconds(run, ids, args.repeats), 4)
        got = run(ids, use_cache=False).logits.float()
        result["relative_error"] = float((got - wanted).norm() / wanted.norm())
    return result


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--method", default="rtn", help="the speed is the format's, whoever chose the codes")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=600, help="start no variant after this long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every variant and print a table."""
    args = parse_arguments()
    begin = time.perf_counter()
    facts = machine(args.device)
    model = make_model(args.shape, args.layers, args.device)
    results: dict[str, Any] = {}
    for name in args.variants:
        if time.perf_counter() - begin > args.seconds:
            print(f"{name:34} left out: out of time", flush=True)
            continue
        try:
            with torch.no_grad():
                results[name] = measure(model, VARIANTS[name], args)
        except Exception as error:  # one variant that cannot be measured leaves the others
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{name:34}", results[name], flush=True)
        if args.output:
            report = {
                "machine": facts, "shape": args.shape, "layers": model.config.num_hidden_layers,
                "method": args.method, "bits": args.bits, "graph_breaks": dict(counters["graph_break"]),
                "results": results,
            }  # fmt: skip
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"graph breaks: {sum(counters['graph_break'].values())}")


if __name__ == "__main__":
    main()
