"""Compile time on a GPU: the HQQ solver over resident weights beside the hqq package, and whole compilations.

    python -m benchmarks.compile_speed --output benchmarks/results/compile-speed.json \
        [--work DIR] [--models llama3-70b:8 llama3-8b]

The solver checks, quantizes and packs every linear of a Llama-3-8B shape (synthetic bf16 weights on the
GPU); the hqq package does so for the linears of one layer, and is compared by the weight. With `--work`,
checkpoints of the shapes asked for are written there (the first while the solver runs) and compiled by
`qcompile`, each in a process of its own; `llama3-70b:8` has the first 8 layers of the shape: 18 GB of
checkpoint and 8 GB of artifact, written twice, on the disk. Before each compilation the system is asked to
forget the checkpoint's pages, so that the disk is read (`--cached`: not).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.checkpoint import qcompile
from benchmarks.timing import machine
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.methods.affine import check_weight
from qcompiler.methods.hqq import HQQ, SEARCHES

# Linears of one layer of Llama-3-8B, out x in features, and the number of layers.
LINEARS = [
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
]
LAYERS = 32


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time, the GPU idle before and after."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def solver_rows(layers: int, bits: list[int], repeats: int) -> list[dict[str, Any]]:
    """Ours over all layers, per bit width; the first also with one round from each start instead of two."""
    torch.manual_seed(0)
    resident = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)
        for _ in range(layers)
        for shape in LINEARS
    ]
    weights = sum(weight.numel() for weight in resident)
    method, rows = HQQ(), []
    for width, rounds in [*((width, SEARCHES[width].rounds) for width in bits), (bits[0], 1)]:
        spec, search = AffineSpec(width, 64), SEARCHES[width]

        def solve(spec: AffineSpec = spec) -> None:
            for weight in resident:
                method.quantize(weight, spec)

        SEARCHES[width] = search._replace(rounds=rounds)
        try:
            for weight in resident[: len(LINEARS)]:  # compiles the kernels
                method.quantize(weight, spec)
            row = {"bits": width, "rounds": rounds, "weights": weights, "seconds": seconds(solve, repeats)}
        finally:
            SEARCHES[width] = search
        rows.append(row)
        print(
            f"hqq {width} bit, {rounds} rounds, {weights / 1e9:.2f} G weights: {row['seconds']:.4f} s",
            flush=True,
        )
    return rows


def stage_times(repeats: int) -> dict[str, float]:
    """Milliseconds of each step of one 14336x4096 weight at 4 bits, and of the search under other tiles."""
    from qcompiler.kernels.triton.search.affine_pack import affine_pack
    from qcompiler.kernels.triton.search.affine_search import Tile, affine_search

    weight = torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    spec, method = AffineSpec(4, 64), HQQ()
    columns = method.statistics(weight, {})
    codes, _, _ = affine_search(weight, spec, SEARCHES[4], columns)
    steps: dict[str, Callable[[], Any]] = {
        "check": lambda: check_weight(weight, spec, "weight"),
        "statistics": lambda: method.statistics(weight, {}),
        "search": lambda: affine_search(weight, spec, SEARCHES[4], columns),
        "pack": lambda: affine_pack(codes, spec),
        "all": lambda: method.quantize(weight, spec),
    }
    for values in (64, 32, 16):
        for warps in (2, 4, 8):
            lanes = 64 // values
            tile = Tile(lanes, 32 * warps // lanes, values // 8, 8, warps)
            steps[f"search, {values} values a thread, {warps} warps"] = lambda tile=tile: affine_search(
                weight, spec, SEARCHES[4], columns, tile=tile
            )
    times = {}
    for name, step in steps.items():
        step()
        times[name] = 1e3 * seconds(step, repeats)
        print(f"  {name}: {times[name]:.3f} ms", flush=True)
    return times


def package_row(bits: int, repeats: int) -> dict[str, Any]:
    """The hqq package over the linears of one layer, as its own defaults have it for these settings."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        print(f"hqq package skipped: {error}", flush=True)
        return {"bits": bits, "skipped": str(error)}
    torch.manual_seed(0)
    resident = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02) for shape in LINEARS]

    def solve() -> None:
        for weight in resident:
            Quantizer.quantize(
                weight, nbits=bits, channel_wise=True, group_size=64, optimize=True, round_zero=bits == 4,
                axis=1, compute_dtype=torch.bfloat16, device="cuda",
            )  # fmt: skip

    solve()
    weights = sum(weight.numel() for weight in resident)
    row = {"bits": bits, "weights": weights, "seconds": seconds(solve, repeats)}
    print(f"hqq package {bits} bit, {weights / 1e9:.3f} G weights: {row['seconds']:.4f} s", flush=True)
    return row


def errors(bits: int) -> dict[str, float]:
    """Weighted squared error of the kernel's result over that of the solver in torch, on one weight."""
    torch.manual_seed(1)
    weight = torch.randn(4096, 4096, device="cuda").mul_(0.02).to(torch.bfloat16)
    method, spec = HQQ(), AffineSpec(bits, 64)
    importance = method.importance(weight.float(), method.statistics(weight, {}))
    solution = method.solve(weight, spec)
    in_torch = AFFINE.pack(spec, solution.codes, solution.scales, solution.zeros)
    found = []
    for tensors in (method.quantize(weight, spec), in_torch):
        stored = AFFINE.dequantize(spec, tensors, weight.shape[1], torch.float32)
        found.append(float((importance * (stored - weight.float()).square()).sum(dtype=torch.float64)))
    return {"kernel": found[0], "torch": found[1], "ratio": found[0] / found[1]}


def forget_pages(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of a checkpoint."""
    largest = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                part = file.get_slice(name)
                largest = max(largest, 2 * math.prod(part.get_shape()))
    return largest


class Checkpoint:
    """A checkpoint being written by a process of its own."""

    def __init__(self, model: str, work: Path):
        self.shape, _, layers = model.partition(":")
        self.folder = work / f"{self.shape}-checkpoint"
        shutil.rmtree(self.folder, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.checkpoint", self.shape, str(self.folder)]
        self._process = subprocess.Popen([*command, *(["--layers", layers] if layers else [])])

    def wait(self) -> None:
        """Until it is there.

        Raises:
            RuntimeError: It could not be written.
        """
        if self._process.wait():
            raise RuntimeError(f"{self.folder} could not be written")


def compilation(model: str, checkpoint: Checkpoint, *, cached: bool, device: str) -> dict[str, Any]:
    """Compile a checkpoint, and remove it and the artifact."""
    checkpoint.wait()
    folder, artifact = checkpoint.folder, checkpoint.folder.with_name(f"{checkpoint.shape}-artifact")
    largest = largest_tensor(folder)
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    started = time.perf_counter()
    if not cached:
        forget_pages(folder)
    flushed = time.perf_counter() - started
    started = time.perf_counter()
    report = qcompile(
        folder, artifact, ["--method", "hqq", "--bits", "4", "--group-size", "64", "--device", device]
    )
    row = {
        "model": model,
        "arguments": "--method hqq --bits 4 --group-size 64",
        "source_bytes": source,
        "flush_seconds": flushed,
        "pages": "cached" if cached else "dropped before",
        "seconds": report["seconds"],
        "process_seconds": report["process_seconds"],
        "source_bytes_per_second": source / report["process_seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "memory_bound_bytes": 4 * largest + 1_000_000_000,
        "artifact_bytes": report["bytes"],
    }
    print(
        f"qcompile {model}: {source / 1e9:.1f} GB in {row['process_seconds']:.1f} s "
        f"({row['source_bytes_per_second'] / 1e9:.2f} GB/s), peak {row['peak_rss_bytes'] / 1e9:.2f} GB",
        flush=True,
    )
    shutil.rmtree(folder)
    shutil.rmtree(artifact)
    return row


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2, 8], help="solver; none skips it")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and artifacts")
    parser.add_argument(
        "--models", nargs="*", default=["llama3-70b:8", "llama3-8b"], metavar="SHAPE[:LAYERS]"
    )
    parser.add_argument("--cached", action="store_true", help="leave the checkpoint in the page cache")
    parser.add_argument("--device", default="cuda", help="of the compilations")
    parser.add_argument("--stages", action="store_true", help="also time each step of one weight")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what was asked for and write one JSON file after each part."""
    options = parse_arguments()
    models = options.models if options.work else []
    if models:
        options.work.mkdir(parents=True, exist_ok=True)
    writing = Checkpoint(models[0], options.work) if models else None
    result: dict[str, Any] = {"machine": machine(options.device), "cores": len(os.sched_getaffinity(0))}
    if options.bits:
        result["solver"] = solver_rows(options.layers, options.bits, options.repeats)
        torch.cuda.empty_cache()
        result["package"] = package = package_row(options.bits[0], options.repeats)
        ours = result["solver"][0]
        if "seconds" in package:
            factor = package["seconds"] / package["weights"] / (ours["seconds"] / ours["weights"])
            result["times_faster_than_package"] = factor
            print(f"{factor:.0f} times the package's speed per weight", flush=True)
        if options.stages:
            result["stages_ms"] = stage_times(options.repeats)
        result["errors"] = {str(bits): errors(bits) for bits in options.bits}
        print({bits: round(error["ratio"], 6) for bits, error in result["errors"].items()}, flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()
    result["compilations"] = []
    for model, after in zip(models, [*models[1:], None], strict=True):
        assert writing is not None
        row = compilation(model, writing, cached=options.cached, device=options.device)
        result["compilations"].append(row)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        writing = Checkpoint(after, options.work) if after else None


if __name__ == "__main__":
    main()
