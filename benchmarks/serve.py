"""The server under load: throughput beside the bare engine, and what long prompts do to the others' tokens.

    python -m benchmarks.serve ARTIFACT --output benchmarks/results/serve.json
    python -m benchmarks.serve --shape llama3-8b --variant affine-4 --output benchmarks/results/serve.json

The second form makes a model of that shape on the device (see `benchmarks.synthetic`). Clients are processes
of their own, on cores of their own where there are eight or more, that speak HTTP over the loopback; every
token is an event. How much of the time the busiest of them computed stands beside each figure.

Throughput: N streams begin together. `decode` is tokens per second while all N are generating, for the bare
engine as `qrun bench` measures it; `whole` is all generated tokens over the time from the first request to
the last token, prompts included. Latency: S streams generate; the gaps between their events, quiet and while
prompts of `--long-prompt` tokens arrive, with prompts taken in pieces and without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import SHAPES
from benchmarks.timing import machine
from qcompiler.runtime.artifact import Artifact, open_artifact
from qcompiler.runtime.bench import bench
from qcompiler.runtime.model import Model, load_opened
from qcompiler.runtime.server.app import create_app
from qcompiler.runtime.server.limits import Limits
from qcompiler.runtime.server.main import bind, make_server

ROOT = Path(__file__).parents[1]
_LEAD = 0.5  # seconds that client processes have to start
CLIENT_CORES: list[int] = []  # where clients run, see `cores_apart`; empty: anywhere


@contextlib.contextmanager
def serving(model: Model, **options: Any) -> Iterator[int]:
    """The port of a server of the model, as `qrun serve` runs it."""
    limits = Limits(max_connections=4096, max_waiting=4096, max_n=1)
    app = create_app(model, limits, name="model", **options)
    with bind("127.0.0.1", 0) as listener:
        server = make_server(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def cores_apart() -> Iterator[None]:
    """Clients on one half of the cores and the server on the other; where there are few, both on all."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half >= 4:
        os.sched_setaffinity(0, cores[:half])
        CLIENT_CORES[:] = cores[half:]
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        CLIENT_CORES.clear()


class Clients:
    """A client process that runs one job."""

    def __init__(self, job: dict[str, Any]):
        job = {**job, "cpus": CLIENT_CORES}
        command = [sys.executable, "-m", "benchmarks.clients"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._process.stdin is not None
        json.dump(job, self._process.stdin)
        self._process.stdin.close()

    def result(self) -> dict[str, Any]:
        """What it measured."""
        assert self._process.stdout is not None
        text = self._process.stdout.read()
        if self._process.wait():
            raise RuntimeError("a client process failed")
        return json.loads(text)


def run_streams(port: int, streams: int, processes: int, at: float, **job: Any) -> list[Clients]:
    """Start `streams` streams at the moment `at`, spread over client processes."""
    shares = [streams // processes + (i < streams % processes) for i in range(processes)]
    return [
        Clients({"kind": "streams", "port": port, "at": at, "streams": share, **job, "seed": job["seed"] + i})
        for i, share in enumerate(shares)
        if share
    ]


def throughput(
    port: int, streams: int, options: argparse.Namespace, seed: int, vocab: int
) -> dict[str, float]:
    """Tokens per second of `streams` streams that begin together."""
    at = time.monotonic() + _LEAD
    job = {
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.decode_tokens,
        "vocab": vocab,
        "seed": seed,
    }
    started = run_streams(port, streams, options.processes, at, **job)
    results = [clients.result() for clients in started]
    times = [stream for result in results for stream in result["times"]]
    all_running = max(stream[0] for stream in times)
    first_end = min(stream[-1] for stream in times)
    within = sum(all_running < t <= first_end for stream in times for t in stream)
    return {
        "decode": within / (first_end - all_running),
        "whole": streams * options.decode_tokens / (max(stream[-1] for stream in times) - at),
        "first_token_seconds_max": all_running - at,
        "client_busy": max(result["busy"] for result in results),
    }


def gaps(streams: list[list[float]], begin: float, end: float) -> torch.Tensor:
    """Seconds between consecutive events of each stream, of those that lie in the window."""
    found = [b - a for stream in streams for a, b in pairwise(stream) if begin <= a and b <= end]
    return torch.tensor(found, dtype=torch.float64)


def latency(port: int, options: argparse.Namespace, vocab: int, *, prompts: bool) -> dict[str, float]:
    """Quantiles of the time between tokens, in milliseconds."""
    at = time.monotonic() + _LEAD
    job = {
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.latency_tokens,
        "vocab": vocab,
        "seed": 99,
    }
    started = run_streams(port, options.latency_streams, options.processes, at, **job)
    loader = None
    if prompts:
        loader = Clients({
            "kind": "prompts", "port": port, "at": at + options.settle, "seconds": options.seconds,
            "rate": options.rate, "prompt_tokens": options.long_prompt, "vocab": vocab, "seed": 7,
        })  # fmt: skip
    results = [clients.result() for clients in started]
    times = [stream for result in results for stream in result["times"]]
    begin = max(stream[0] for stream in times) + options.settle
    end = min(begin + options.seconds, min(stream[-1] for stream in times))
    loaded = loader.result() if loader is not None else None
    if loaded is not None:  # while prompts were there
        begin, end = max(begin, loaded["begin"]), min(loaded["end"], min(stream[-1] for stream in times))
    found = gaps(times, begin, end) * 1e3
    if not len(found):
        raise RuntimeError("the streams ended too early: ask for more --latency-tokens")
    quantiles = torch.quantile(found, torch.tensor([0.5, 0.9, 0.99], dtype=found.dtype)).tolist()
    row = dict(zip(("p50_ms", "p90_ms", "p99_ms"), quantiles, strict=True))
    row |= {"max_ms": found.max().item(), "gaps": float(len(found)), "window_seconds": end - begin}
    row["client_busy"] = max(result["busy"] for result in results)
    if loaded is not None:
        taken = sorted(loaded["seconds"])
        row |= {"long_prompts": float(len(taken)), "long_prompt_seconds_median": taken[len(taken) // 2]}
    return row


def load_for(artifact: Artifact, options: argparse.Namespace) -> Model:
    """The model with room for all that is asked of it here."""
    room = max(
        max(options.streams) * (options.prompt_tokens + options.decode_tokens + 64),
        options.latency_streams * (options.prompt_tokens + options.latency_tokens + 64)
        + 8 * options.long_prompt,
    )
    sequences = max(*options.streams, options.latency_streams + 8)
    return load_opened(artifact, options.device, max_sequences=sequences, max_cache_tokens=room)


def measure(model: Model, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Everything, on one loaded model; `result` holds what was measured, should a later part fail."""
    vocab = model.engine.vocab_size
    engine = bench(
        model, batches=tuple(options.streams), prompt_tokens=options.prompt_tokens,
        decode_tokens=options.decode_tokens, repeats=options.repeats,
    )  # fmt: skip
    result |= {"throughput": [], "latency": {}}
    with serving(model) as port:
        for streams, bare in zip(options.streams, engine, strict=True):
            # The first run captures graphs and is not counted.
            runs = [throughput(port, streams, options, 1000 * r, vocab) for r in range(options.repeats + 1)][
                1:
            ]
            middle = sorted(runs, key=lambda run: run["decode"])[len(runs) // 2]
            prefill = streams * bare.prompt_tokens / bare.prefill_tokens_per_second
            whole = (
                streams
                * bare.decode_tokens
                / (prefill + streams * bare.decode_tokens / bare.decode_tokens_per_second)
            )
            row = {
                "streams": streams, "engine_decode": bare.decode_tokens_per_second, "engine_whole": whole,
                "server": runs, "server_decode": middle["decode"],
                "decode_ratio": middle["decode"] / bare.decode_tokens_per_second,
                "whole_ratio": middle["whole"] / whole,
            }  # fmt: skip
            result["throughput"].append(row)
            print(
                f"{streams} streams: engine {bare.decode_tokens_per_second:.0f}, "
                f"server {middle['decode']:.0f} tokens/s while all generate "
                f"(ratio {row['decode_ratio']:.3f}); whole {row['whole_ratio']:.3f}; "
                f"busiest client {middle['client_busy']:.2f}",
                flush=True,
            )
    for name, chunked in (("chunked", True), ("unchunked", False)):
        with serving(model, chunked_prefill=chunked) as port:
            rows = {
                kind: latency(port, options, vocab, prompts=kind == "loaded") for kind in ("quiet", "loaded")
            }
        rows["p99_ratio"] = rows["loaded"]["p99_ms"] / rows["quiet"]["p99_ms"]
        result["latency"][name] = rows
        print(
            f"{name}: p99 between tokens {rows['quiet']['p99_ms']:.1f} ms quiet, "
            f"{rows['loaded']['p99_ms']:.1f} ms with prompts of {options.long_prompt} tokens "
            f"(ratio {rows['p99_ratio']:.2f})",
            flush=True,
        )


def synthetic(options: argparse.Namespace, folder: Path) -> Artifact:
    """A model of the shape with synthetic weights, and a tokenizer in the folder."""
    from benchmarks.synthetic import VARIANTS, SyntheticArtifact, captured_llama

    source, captured = captured_llama(options.shape, options.layers)
    device = torch.device(options.device)
    return SyntheticArtifact(source, captured, VARIANTS[options.variant], device, folder=folder)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--variant", default="affine-4", help="of benchmarks.synthetic, with --shape")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--processes", type=int, default=4, help="client processes")
    parser.add_argument("--latency-streams", type=int, default=32)
    parser.add_argument("--latency-tokens", type=int, default=1024)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds before gaps count")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds for which gaps count")
    parser.add_argument("--long-prompt", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=2.0, help="long prompts per second")
    options = parser.parse_args(arguments)
    if (options.artifact is None) == (options.shape is None):
        parser.error("give an ARTIFACT, or --shape")
    return options


def main() -> None:
    """Measure and write one JSON file."""
    options = parse_arguments()
    facts = machine(options.device)
    started = time.perf_counter()
    name = options.artifact.name if options.artifact else f"{options.shape} {options.variant}"
    settings = {k: v for k, v in vars(options).items() if k not in ("artifact", "output", "device")}
    head = {"machine": facts, "model": name, "settings": settings, "cores": len(os.sched_getaffinity(0))}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, cores_apart():
        if options.artifact:
            artifact = open_artifact(options.artifact, verify="sizes")
        else:
            artifact = synthetic(options, Path(folder))
        try:
            measure(load_for(artifact, options), options, result)
        finally:
            seconds = round(time.perf_counter() - started, 1)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**head, "seconds": seconds, **result}, indent=1)
            options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
