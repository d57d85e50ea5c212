"""Times linear_affine on a GPU beside bf16 cuBLAS and tinygemm; correctness first.

Every timing is the median over CUDA-graph replays with the weights rotated
past the L2 cache. The read ceiling is the fastest of several plain Triton
streaming reads of as many bytes, in the same run. `--tune` tries the
configurations and writes the winners where `kernels/tuning` finds them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import num_groups
from qcompiler.kernels.tuning.tables import LinearConfig, table_key, table_path, token_bucket

SHAPES = ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]
L2_BYTES = 192 << 20  # rotate over more than three times the largest L2 at hand


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK", help="out x in features")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="graph replays per timing")
    parser.add_argument(
        "--tune", action="store_true", help="try configurations, write the winners as a table"
    )
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def candidates(tokens: int) -> list[LinearConfig]:
    if tokens > 512:
        return [
            LinearConfig("dense"),
            LinearConfig("gemm", 128, 128, 1, 8, 2),
            LinearConfig("gemm", 128, 128, 1, 8, 3),
        ]
    block_m = min(128, max(16, token_bucket(tokens)))
    found = [
        LinearConfig("gemm", block_n, block_m, split, warps, stages)
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
        for split in (1, 2, 4, 8)
        for stages in (2, 3, 4)
        if tokens <= 64 or (split == 1 and block_n == 128)
    ]
    if tokens <= 4:
        found += [
            LinearConfig("gemv", block_n, token_bucket(tokens), split, warps, 2)
            for block_n in (16, 32, 64)
            for warps in (2, 4)
            for split in (1, 2, 4)
        ]
    if tokens > 64:
        found.append(LinearConfig("dense"))
    return found


def graph_microseconds(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Median time of one call in µs; all calls (one per rotated copy) stand in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


def read_ceiling(count: int, repeats: int) -> float:
    """Fastest of several streaming reads of `count` bytes, µs."""
    from stream_read import stream_read

    words = -(-count // 4)
    copies = max(2, -(-L2_BYTES // (4 * words)))
    buffers = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(copies)]
    best = float("inf")
    for block, warps, per_program in ((1024, 4, 1), (2048, 4, 2), (4096, 8, 1), (4096, 8, 4), (2048, 4, 8)):
        programs = -(-words // (block * per_program))
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def call(buffer, programs=programs, out=out, block=block, warps=warps, per_program=per_program):
            return lambda: stream_read[(programs,)](
                buffer, out, words, BLOCK=block, STEPS=per_program, num_warps=warps
            )

        best = min(best, graph_microseconds([call(buffer) for buffer in buffers], repeats))
    return best


def quantized(spec: AffineSpec, n: int, k: int) -> dict[str, torch.Tensor]:
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, groups, device="cuda") + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(n, groups, device="cuda")
    return AFFINE.pack(spec, codes, scales, zeros)


def check(spec: AffineSpec, tensors: dict[str, torch.Tensor], x: torch.Tensor, config: LinearConfig) -> None:
    """Stop when a configuration is wrong: a fast wrong kernel is no figure."""
    from qcompiler.kernels.triton.linear_affine import linear_affine_triton

    k = x.shape[1]
    weight = AFFINE.dequantize(spec, tensors, k, torch.float32)
    wanted = x.double() @ weight.double().T
    y = linear_affine_triton(*AFFINE.op_call(spec, x, tensors, None, k)[1], config=config)
    error = float((y.double() - wanted).norm() / wanted.norm())
    if not error < 4 * torch.finfo(x.dtype).eps:
        raise SystemExit(f"{config} is wrong by {error:.2e} at {tuple(weight.shape)}, {x.shape[0]} tokens.")


def tinygemm(
    spec: AffineSpec, tensors: dict[str, torch.Tensor], k: int
) -> Callable[[torch.Tensor], Any] | None:
    n = tensors["low"].shape[0]
    if spec.bits != 4 or spec.group_size not in (32, 64, 128, 256) or n % 8 or k % 128:
        return None
    codes, scales, zeros = AFFINE.unpack(spec, tensors, k)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scale = scales.float()
    offset = (8 - zeros.float()) * scale
    sides = torch.stack((scale, offset), -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, spec.group_size, sides)


def run(options: argparse.Namespace) -> dict[str, Any]:
    import triton

    from qcompiler.kernels.triton.linear_affine import linear_affine_triton
    from qcompiler.kernels.tuning.tables import linear_config

    properties = torch.cuda.get_device_properties(0)
    dtype = getattr(torch, options.dtype)
    rows: list[dict[str, Any]] = []
    winners: dict[str, dict[str, Any]] = {}
    for bits in options.bits:
        spec = AffineSpec(bits, options.group_size)
        for shape in options.shapes:
            n, k = map(int, shape.split("x"))
            size = AFFINE.nbytes(spec, n, k)
            weights = [quantized(spec, n, k) for _ in range(max(2, -(-L2_BYTES // size)))]
            dense = [
                torch.randn(n, k, dtype=dtype, device="cuda")
                for _ in range(max(2, -(-L2_BYTES // (2 * n * k))))
            ]
            peers = [tinygemm(spec, w, k) for w in weights] if dtype == torch.bfloat16 else []
            ceiling = read_ceiling(size, options.repeats)
            for tokens in options.tokens:
                x = torch.randn(tokens, k, dtype=dtype, device="cuda")
                bucket = token_bucket(tokens)
                default = linear_config(
                    properties.name,
                    properties.multi_processor_count,
                    bits,
                    options.group_size,
                    n,
                    k,
                    bucket,
                    options.dtype,
                )
                timed = {}
                for config in candidates(tokens) if options.tune else [default]:
                    try:
                        check(spec, weights[0], x, config)
                    except triton.runtime.errors.OutOfResources as error:
                        print(f"# {config}: {error}", file=sys.stderr)
                        continue
                    calls = [AFFINE.op_call(spec, x, w, None, k)[1] for w in weights]
                    timed[config] = graph_microseconds(
                        [lambda a=a, c=config: linear_affine_triton(*a, config=c) for a in calls],
                        options.repeats,
                    )
                best = min(timed, key=lambda config: timed[config])
                winners[table_key(bits, options.group_size, n, k, tokens, options.dtype)] = best.to_json()
                rows.append(
                    {
                        "bits": bits,
                        "group_size": options.group_size,
                        "n": n,
                        "k": k,
                        "tokens": tokens,
                        "us": timed[best],
                        "config": best.to_json(),
                        "cublas_us": graph_microseconds(
                            [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense],
                            options.repeats,
                        ),
                        "tinygemm_us": graph_microseconds(
                            [lambda p=p, x=x: p(x) for p in peers], options.repeats
                        )
                        if peers and peers[0] is not None
                        else None,
                        "read_ceiling_us": ceiling,
                    }
                )
                print_row(rows[-1])
            del weights, dense, peers
    environment = {
        "gpu": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if options.tune:
        path = table_path(properties.name)
        entries = json.loads(path.read_text())["entries"] if path.is_file() else {}
        table = {
            "schema": 1,
            "gpu": properties.name,
            "measured_with": environment,
            "entries": dict(sorted({**entries, **winners}.items())),
        }
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(f"# wrote {path.name}", file=sys.stderr)
    return {"environment": environment, "rows": rows}


def print_row(row: dict[str, Any]) -> None:
    config = row["config"]
    peer = f"{row['tinygemm_us']:9.1f}" if row["tinygemm_us"] is not None else "        -"
    print(
        f"b{row['bits']} g{row['group_size']:<4} {row['n']:>6}x{row['k']:<6} m{row['tokens']:<5} "
        f"ours {row['us']:8.1f}  bf16 {row['cublas_us']:8.1f}  tinygemm {peer}  "
        f"read {row['read_ceiling_us']:7.1f} µs  "
        f"{config['kind']} n{config['block_n']} m{config['block_m']} split{config['split_k']} "
        f"w{config['num_warps']} s{config['num_stages']}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/linear.py needs a CUDA device; there is none here.", file=sys.stderr)
        return 2
    result = run(options)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
