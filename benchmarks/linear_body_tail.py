"""Times linear_body_tail on a GPU beside bf16 cuBLAS and linear_affine; correctness first.

    python -m benchmarks.linear_body_tail [--tune]

Timed as in benchmarks/linear.py: medians over CUDA-graph replays, weights rotated past the L2 cache.
`--tune` tries the configurations and adds the winners to the table of this GPU in kernels/tuning.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.linear import L2_BYTES, graph_microseconds
from qcompiler.kernels.formats import AFFINE, BODY_TAIL, BodyTailSpec
from qcompiler.kernels.formats.affine import num_groups
from qcompiler.kernels.formats.body_tail import in_blocks, tail_layout
from qcompiler.kernels.tuning.tables import LinearConfig, table_path, token_bucket


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "28672x8192"], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512, 2048])
    parser.add_argument("--bits", nargs="+", type=int, default=[3])
    parser.add_argument("--fraction", type=float, default=0.005)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--output", type=Path, default=None, metavar="FILE")
    return parser.parse_args(arguments)


def candidates(tokens: int) -> list[LinearConfig]:
    """Configurations worth trying for a number of tokens."""
    if tokens > 512:
        return [LinearConfig("dense"), LinearConfig("gemm", 128, 128, 1, 8, 2)]
    if tokens > 64:
        return [
            LinearConfig("gemm", 128, 128, 1, 8, 2),
            LinearConfig("gemm", 128, 64, 1, 8, 3),
            LinearConfig("dense"),
        ]
    block_m = max(8, token_bucket(tokens))
    found = [
        LinearConfig("gemm", block_n, block_m, split, warps, stages)
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
        for split in (1, 2, 4, 8)
        for stages in (2, 3, 4)
    ]
    if tokens <= 2:
        found += [
            LinearConfig("gemv", block_n, 1, split, warps, 2)
            for block_n in (16, 32)
            for warps in (4, 8)
            for split in (1, 2, 4)
        ]
    return found


def quantized(spec: BodyTailSpec, n: int, k: int) -> dict[str, torch.Tensor]:
    """A random body with a random tail in every slot, on the GPU."""
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(n, groups, device="cuda") + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(n, groups, device="cuda")
    body = AFFINE.pack(spec.body, codes, scales, zeros)
    _, slots, block = tail_layout(spec, k)
    parts = []
    for rows in torch.arange(n).split(4096):
        score = in_blocks(torch.rand(len(rows), k, device="cuda") + 1, block)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen = chosen.scatter_(2, score.topk(slots, dim=2).indices, True).flatten(1)[:, :k]
        side = {name: t[rows[0] : rows[-1] + 1] for name, t in body.items() if name in ("low", "high")}
        side |= {name: body[name][:, rows[0] : rows[-1] + 1] for name in ("scales", "zeros")}
        parts.append(BODY_TAIL.pack(spec, side, torch.randn(len(rows), k, device="cuda"), chosen))
    return BODY_TAIL.concat(spec, parts)


def relative_error(spec: BodyTailSpec, tensors: dict[str, torch.Tensor], x: torch.Tensor, y: Any) -> float:
    """|y − x·Wᵀ| / |x·Wᵀ| against the dequantized weight."""
    wanted = x.float() @ BODY_TAIL.dequantize(spec, tensors, x.shape[1], torch.float32).T
    return float((y.float() - wanted).norm() / wanted.norm())


def measure(options: argparse.Namespace, bits: int, n: int, k: int) -> tuple[list[dict], dict[str, dict]]:
    """Rows of figures and the winners' table entries of one shape."""
    import triton

    from qcompiler.kernels.triton.linear_affine import linear_affine_triton
    from qcompiler.kernels.triton.linear_body_tail import heuristic, linear_body_tail_triton

    torch.set_float32_matmul_precision("highest")
    spec = BodyTailSpec(bits, 64, options.fraction)
    copies = max(2, -(-L2_BYTES // BODY_TAIL.nbytes(spec, n, k)))
    weights = [quantized(spec, n, k) for _ in range(copies)]
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, copies // 4))]
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows, winners = [], {}
    for tokens in options.tokens:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        calls = [BODY_TAIL.op_call(spec, x, w, None, k)[1] for w in weights]
        timed = {}
        default = heuristic(n, k, tokens, "bfloat16", sms)
        for config in {default: None, **dict.fromkeys(candidates(tokens) if options.tune else [])}:
            try:
                y = linear_body_tail_triton(*calls[0], config=config)
            except triton.runtime.errors.OutOfResources as error:
                print(f"# {config}: {error}", file=sys.stderr)
                continue
            error = relative_error(spec, weights[0], x, y)
            if not error < 4 * torch.finfo(x.dtype).eps:
                raise SystemExit(f"{config} is wrong by {error:.2e} at {n}x{k}, {tokens} tokens.")
            timed[config] = graph_microseconds(
                [lambda a=a, c=config: linear_body_tail_triton(*a, config=c) for a in calls], options.repeats
            )
        best = min(timed, key=lambda config: timed[config])
        key = f"linear_body_tail/affine-b{bits}-g64/n{n}-k{k}/m{token_bucket(tokens)}/bfloat16"
        winners[key] = best.to_json()
        affine = [AFFINE.op_call(spec.body, x, w, None, k)[1] for w in weights]
        cublas = graph_microseconds(
            [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], options.repeats
        )
        body = graph_microseconds([lambda a=a: linear_affine_triton(*a) for a in affine], options.repeats)
        rows.append(
            {
                "bits": bits, "fraction": options.fraction, "n": n, "k": k, "tokens": tokens,
                "us": timed[best], "default_us": timed[default], "config": best.to_json(),
                "cublas_us": cublas, "affine_us": body,
            }
        )  # fmt: skip
        print(
            f"b{bits} {n:>6}x{k:<6} m{tokens:<5} ours {timed[best]:8.1f}  default {timed[default]:8.1f}  "
            f"bf16 {cublas:8.1f} ({cublas / timed[best]:.2f}x)  affine {body:8.1f} µs  {best}",
            flush=True,
        )
    return rows, winners


def main(arguments: list[str] | None = None) -> int:
    """Time, and write what was asked for."""
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/linear_body_tail.py needs a CUDA device; there is none here.", file=sys.stderr)
        return 2
    import triton

    gpu = torch.cuda.get_device_name(0)
    environment = {
        "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
    }  # fmt: skip
    rows: list[dict] = []
    winners: dict[str, dict] = {}
    for bits in options.bits:
        for shape in options.shapes:
            n, k = map(int, shape.split("x"))
            more, won = measure(options, bits, n, k)
            rows, winners = rows + more, {**winners, **won}
    if options.tune:
        path = table_path(gpu)
        table = {"schema": 1, "gpu": gpu, "measured_with": environment, "entries": {}}
        if path.is_file():
            table = json.loads(path.read_text())
        table["entries"] = dict(sorted({**table["entries"], **winners}.items()))
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(f"# wrote {path.name}", file=sys.stderr)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
