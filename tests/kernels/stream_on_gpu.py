"""Runs the streaming GEMM on a Hopper GPU against the reference; prints a JSON object per case.

A process of its own: a barrier that is never told of hangs it and not the tests. The argument is the number
of a line of `RUNS`.
"""

from __future__ import annotations

import json
import sys

import torch
from test_linear_affine_sides import prepared

from qcompiler.kernels.triton.linear import affine_stream_launch as linear_stream
from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton
from qcompiler.kernels.tuning.tables import LinearConfig

# block_n, block_m, split_k, warps, word buffers; launched early or not; blocks asked for at a time;
# bits, group size, n, k and dtype
RUNS = [
    ((64, 16, 16, 4, 5), True, 2, [(4, 64, 336, 4288, "bfloat16")]),
    ((64, 16, 16, 4, 6), True, 1, [(4, 64, 336, 4096, "bfloat16")]),
    ((64, 16, 16, 4, 6), False, 1, [(4, 64, 336, 4096, "bfloat16")]),
    ((64, 64, 3, 4, 3), True, 1, [(4, 64, 336, 4288, "bfloat16"), (4, 128, 200, 4032, "float16")]),
    ((128, 32, 16, 8, 6), True, 1, [(4, 64, 400, 4096, "bfloat16"), (4, 256, 200, 5120, "float16")]),
    ((128, 128, 4, 8, 4), True, 1, [(4, 64, 336, 4288, "bfloat16"), (4, 64, 400, 4096, "float16")]),
    ((256, 128, 2, 8, 2), True, 1, [(4, 64, 400, 4096, "bfloat16")]),
    ((64, 8, 16, 4, 6), True, 1, [(2, 64, 336, 4096, "bfloat16"), (2, 128, 200, 2048, "float16")]),
    ((64, 16, 16, 4, 4), True, 1, [(3, 64, 336, 4288, "bfloat16"), (3, 128, 200, 4096, "float16")]),
]


def poison_new_memory():
    """Whatever is allocated for results and parts of sums starts as NaN."""
    new_empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda self, *shape, **options: new_empty(self, *shape, **options).fill_(
        float("nan")
    )


def main():
    (block_n, block_m, split, warps, buffers), early, burst, cases = RUNS[int(sys.argv[1])]
    linear_stream.EARLY = early
    linear_stream.BURST = burst
    poison_new_memory()
    for bits, group, n, k, dtype in cases:
        for tokens, split_k, bias in (
            (block_m, split, True), (3, 1, True), (2 * block_m + 5, split, True), (2 * block_m + 5, 1, True),
            (block_m, split, False),
        ):  # fmt: skip
            if not bias and (bits, group) != (4, 64):
                continue
            config = LinearConfig("stream", block_n, block_m, split_k, warps, buffers)
            arguments, wanted, size = prepared(bits, group, n, k, tokens, getattr(torch, dtype), bias=bias)
            x, low, high, sides, *_ = arguments
            width = 64 if bits == 4 else 32
            report = {
                "case": [bits, group, n, k, dtype, tokens, split_k, bias],
                "takes": linear_stream.stream_takes(x, low, high, sides, bits, group, width),
            }
            y = linear_affine_sides_triton(*arguments, config=config)
            again = [linear_affine_sides_triton(*arguments, config=config) for _ in range(3)]
            # as assert_close of test_linear_affine_triton has it: at most 1
            eps = torch.finfo(y.dtype).eps
            error = (y.float() - wanted.float()).abs()
            ratio = error / (eps * (wanted.float().abs() + size) + 1e-6 * size)
            report["finite"] = bool(torch.isfinite(y).all())
            report["error"] = float(ratio.max())
            report["same"] = all(torch.equal(y, other) for other in again)
            sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
