"""Whole models: time to the first token, prefill, decode by batch, memory; beside bf16 and other people's.

    python -m benchmarks.model --output benchmarks/results/model.json
    python -m benchmarks.model --variants affine-4 nf4 --batches 1 16 --peers --output FILE

Models of the shape are made on the GPU (see `benchmarks.synthetic`), one after another, and measured in the
engine that serves them. Rows go into FILE as they come and replace those of the same name, so that a run may
be split into several; `--resume` skips rows that are there. `--warm` compiles the kernels first, in a process
for each variant with one layer.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import SHAPES
from benchmarks.model_peers import PEERS
from benchmarks.record import Record
from benchmarks.synthetic import VARIANTS, SyntheticArtifact, captured_llama
from benchmarks.timing import machine
from qcompiler.runtime.bench import bench
from qcompiler.runtime.model import load_opened

USUAL = [
    "bf16", "affine-2", "affine-3", "affine-4", "affine-8", "nf4", "eetq", "llm-int8", "aqlm-2x8", "tail-3",
]  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--variants", nargs="*", choices=sorted(VARIANTS), default=USUAL)
    parser.add_argument("--lm-head-bits", type=int, help="quantize the output head too, in rows of their own")
    parser.add_argument("--kv-bits", choices=["16", "8", "4", "fp8"], default="16")
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=sorted(PEERS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 128])
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 4096], help="tokens of long prompts")
    parser.add_argument("--decode-prompt", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1])
    parser.add_argument("--peer-autotune", action="store_true", help="let inductor tune what it writes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warm", action="store_true", help="compile kernels first, many at a time")
    parser.add_argument("--resume", action="store_true", help="keep rows that the output holds")
    parser.add_argument("--seconds", type=float, default=3600, help="start no row after this long")
    parser.add_argument("--output", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def name_of(options: argparse.Namespace, label: str) -> str:
    """Key of a row: everything that makes it another model."""
    layers = "" if options.layers is None else f", {options.layers} layers"
    return f"{options.shape}{layers}: {label}"


def measure(artifact: SyntheticArtifact, options: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of one model in our engine."""
    started = time.perf_counter()
    needed = options.decode_prompt + options.decode_tokens + 128
    cache = max([batch * needed for batch in options.batches] + [tokens + 128 for tokens in options.prompts])
    model = load_opened(
        artifact, options.device, max_sequences=max([*options.batches, 1]), max_cache_tokens=cache
    )
    gpu = model.device.type == "cuda"
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "decode": {}, "prefill": {}}
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        result["weights_and_cache_gb"] = torch.cuda.memory_allocated() / 1e9
    for tokens in options.prompts:
        (row,) = bench(model, batches=(1,), prompt_tokens=tokens, decode_tokens=1, repeats=options.repeats)
        speed = row.prefill_tokens_per_second
        result["prefill"][str(tokens)] = {"seconds": tokens / speed, "tokens_per_second": speed}
    for batch in options.batches:
        (row,) = bench(
            model, batches=(batch,), prompt_tokens=options.decode_prompt,
            decode_tokens=options.decode_tokens, repeats=options.repeats,
        )  # fmt: skip
        result["decode"][str(batch)] = {"tokens_per_second": row.decode_tokens_per_second}
    if gpu:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def printed(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    decode = "  ".join(f"b{b} {r['tokens_per_second']:.0f}" for b, r in row["decode"].items())
    first = "  ".join(f"{t}: {1e3 * r['seconds']:.1f} ms" for t, r in row["prefill"].items())
    return f"decode {decode} tok/s; first token {first}; peak {row.get('peak_gb', 0):.1f} GB"


def warm(options: argparse.Namespace) -> None:
    """Run each variant once with one layer, in processes side by side, so that its kernels are compiled."""
    begin = time.perf_counter()
    sizes = ["--batches", *map(str, options.batches), "--prompts", *map(str, options.prompts)]
    head = [] if options.lm_head_bits is None else ["--lm-head-bits", str(options.lm_head_bits)]
    base = [
        sys.executable, "-m", "benchmarks.model", "--shape", options.shape, "--layers", "1", "--peers",
        "--decode-tokens", "2", "--repeats", "1", "--kv-bits", options.kv_bits, "--device", options.device,
        *sizes, *head,
    ]  # fmt: skip
    with ThreadPoolExecutor(12) as pool:
        runs = pool.map(
            lambda v: subprocess.run([*base, "--variants", v], capture_output=True, text=True, check=False),
            options.variants,
        )
        for variant, run in zip(options.variants, runs, strict=True):
            if run.returncode:
                print(f"# warming {variant} failed: {run.stderr.strip().splitlines()[-1:]}", flush=True)
    print(f"# warmed in {time.perf_counter() - begin:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    gpu = options.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        print("benchmarks/model.py needs a CUDA device; there is none here (--device cpu).", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    if options.warm:
        warm(options)
    # Without a file to write, nothing is compared: the ceilings are not measured.
    record = Record(options.output, machine(options.device) if options.output else {"gpu": options.device})
    source, captured = captured_llama(options.shape, options.layers) if options.variants else (None, None)
    print(f"# ready after {time.perf_counter() - begin:.0f} s", flush=True)
    failed = 0
    jobs = [*((v, False) for v in options.variants), *((p, True) for p in options.peers)]
    for name, peer in jobs:
        label = PEERS[name][0] if peer else VARIANTS[name].label
        if not peer and options.lm_head_bits is not None:
            label += f"; head {options.lm_head_bits} bit"
        if not peer and options.kv_bits != "16":
            label += f"; KV {options.kv_bits}"
        key = name_of(options, label)
        if (options.resume and key in record) or time.perf_counter() - begin > options.seconds:
            continue
        row: dict[str, Any] = {
            "shape": options.shape, "layers": options.layers or SHAPES[options.shape]["num_hidden_layers"],
            "label": label, "peer": peer, "decode_prompt": options.decode_prompt,
        }  # fmt: skip
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            if peer:
                row |= PEERS[name][1](options)
                row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if gpu else {}
            else:
                assert source is not None
                assert captured is not None
                artifact = SyntheticArtifact(
                    source, captured, VARIANTS[name], torch.device(options.device),
                    lm_head_bits=options.lm_head_bits, kv_bits=options.kv_bits,
                )  # fmt: skip
                row |= {"note": VARIANTS[name].note, **measure(artifact, options)}
                del artifact
        except Exception as error:  # one model that cannot be measured leaves the others
            traceback.print_exc()
            failed += 1
            row["failed"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
        record.add(key, row)
        print(f"{label:44} {printed(row)}", flush=True)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
