"""The body_tail kernels compile for an H100 without one, spill nothing, and stay as tight as when written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# kernel, bits, rows of a tile, tokens of a tile, slots together, warps, stages, most instructions per weight
VARIANTS = {
    "one token": ("gemm", 3, 128, 8, 4, 4, 3, 4.2),
    "one token, few rows": ("gemm", 3, 64, 8, 4, 4, 3, 5.2),
    "16 tokens": ("gemm", 3, 64, 16, 4, 4, 3, 5.6),
    "16 tokens, 4 bits": ("gemm", 4, 64, 16, 4, 4, 3, 4.0),
    "64 tokens": ("gemm", 3, 64, 64, 2, 4, 3, 7.0),
    "512 tokens": ("gemm", 3, 128, 128, 1, 8, 2, 6.8),
    "ragged fp16": ("gemm", 3, 64, 8, 4, 4, 3, None),
    "gemv": ("gemv", 3, 32, 1, 16, 8, 2, 6.7),
    "gemv float32": ("gemv", 3, 16, 4, 16, 8, 2, None),
}

# The interpreter replaces triton.jit when triton is imported, so compiling needs a process of its own.
SCRIPT = """
import sys
import triton.language as tl
from offline import compile_sm90
from qcompiler.kernels.formats.affine import block_width
from qcompiler.kernels.formats.body_tail import BodyTailSpec, tail_layout
from qcompiler.kernels.triton.linear import body_tail_slots as slots_module
from qcompiler.kernels.triton.linear.body_tail_gemm import linear_body_tail_gemm
from qcompiler.kernels.triton.linear.body_tail_gemv import linear_body_tail_gemv

K = 8192
TYPES = dict(pairs="*i32", x_sums="*fp32", low="*i32", high="*i16", scales="*fp16", zeros="*fp16",
             tail="*i16", tail_scales="*fp16", sums="*fp32", weight="*bf16")
WHOLE = ("N", "K", "GROUPS", "words", "x_stride", "xt_stride")

def types(kernel, constants, dtype):
    found = {}
    for name in kernel.arg_names:
        if name not in constants:
            size = "i32:16" if name in WHOLE else "i32"
            of_x = name in ("x", "xt", "bias", "out")
            found[name] = TYPES.get(name, f"*{dtype}" if of_x else size)
    return found

def report(name, kernel, constants, dtype, warps, stages, weights):
    given = types(kernel, constants, dtype)
    made = compile_sm90(kernel, given, constants, num_warps=warps, num_stages=stages)
    opcodes = made.loop()
    cost = sum(opcodes.values()) * 32 * warps / weights
    cores = sum(count for opcode, count in opcodes.items() if opcode in ("HGMMA", "HMMA"))
    print(name, made.registers, made.spill_bytes, cost, cores, sep="|")

for line in sys.argv[1:]:
    name, kind, *numbers = line.split("|")
    bits, rows, tokens, together, warps, stages = map(int, numbers)
    _, slots, columns = tail_layout(BodyTailSpec(bits, 64, 0.005), K)
    width = block_width(bits, 64, K)
    dtype = "fp32" if "float32" in name else "fp16" if "fp16" in name else "bf16"
    constants = dict(BITS=bits, GROUP=64, WIDTH=width, SLOTS=slots, COLUMNS=columns, TAIL_BITS=8, BN=rows,
                     TS=together, SPLIT=1, HAS_BIAS=True, COMPILED=True,
                     HALF=tl.float16 if dtype == "fp16" else tl.bfloat16)
    block = width * {2: 8, 3: 8, 4: 4, 8: 2}[bits]
    if kind == "gemv":
        constants |= dict(ROWS=16, KB=8, PAIRS=dtype != "fp32", EVEN=True)
        report(name, linear_body_tail_gemv, constants, dtype, warps, stages, rows * block * 8)
    else:
        constants |= dict(BM=tokens, EVEN_K="ragged" not in name)
        report(name, linear_body_tail_gemm, constants, dtype, warps, stages, rows * block)
constants = dict(BM=8, BK=64)
report("prepare", slots_module.prepare_x_kernel, constants, "bf16", 4, 2, 1)
constants = dict(SLOTS=2, COLUMNS=200, TAIL_BITS=8, BN=64, TS=8)
report("add tail", slots_module.add_tail_kernel, constants, "bf16", 4, 2, 1)
"""


def test_kernels_compile_for_sm90_without_spilling_and_stay_tight():
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(here)}
    lines = ["|".join(map(str, (name, *variant[:-1]))) for name, variant in VARIANTS.items()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *lines],
        capture_output=True, text=True, timeout=500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [line.split("|") for line in done.stdout.strip().splitlines()]
    assert {name for name, *_ in reports} == {*VARIANTS, "prepare", "add tail"}
    for name, registers, spilled, cost, cores in reports:
        assert int(spilled) == 0, name
        assert int(registers) <= 255, name
        limit = VARIANTS[name][-1] if name in VARIANTS else None
        if limit is not None:
            assert float(cost) <= limit, name
        if name.endswith(("tokens", "token")):
            assert int(cores) >= 8, name
