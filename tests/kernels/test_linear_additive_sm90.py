"""The additive kernels compile for an H100 without one, and spill no registers; outside the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# (kernel, codebooks, bits, group size, tokens per tile)
VARIANTS = [
    ("lookup", 2, 8, 8, 1),
    ("lookup", 1, 16, 8, 1),
    ("lookup", 1, 12, 8, 4),
    ("lookup", 3, 8, 8, 2),
    ("gemm", 2, 8, 8, 16),
    ("gemm", 1, 16, 8, 64),
    ("gemm", 2, 12, 16, 64),
]

# The interpreter replaces triton.jit when triton is imported, so compiling needs a process of its own.
SCRIPT = """
import sys
from offline import compile_sm90
from qcompiler.kernels.triton import linear_additive as kernels

for variant in sys.argv[1:]:
    name, count, bits, d, tokens = variant.split(",")
    count, bits, d, tokens = map(int, (count, bits, d, tokens))
    lookup = name == "lookup"
    codes = "*i16" if bits == 16 else "*u8"
    types = dict(x="*bf16", codes=codes, codebooks="*fp16", scales="*fp16", row_counts="*i32", bias="*bf16",
                 out="*bf16", M="i32", N="i32:16", K="i32:16", G="i32:16", columns="i32:16",
                 x_stride="i32:16", tiles_per_split="i32")
    constants = dict(BITS=bits, COUNT=count, D=d, SETS=3, BN=16 // tokens if lookup else 64,
                     BG=(256 if lookup else 64) // d, BM=tokens, SPLIT=1, HAS_BIAS=True)
    if not lookup:
        constants["COMPILED"] = True
    kernel = kernels.linear_additive_lookup if lookup else kernels.linear_additive_gemm
    made = compile_sm90(kernel, types, constants, num_stages=3)
    tensor_cores = "HGMMA" in made.sass or "HMMA." in made.sass
    wide = any("LDG" in line and ".128" in line for line in made.sass.splitlines())
    print(variant, made.registers, made.spill_bytes, int(tensor_cores), int(wide))
"""


def test_kernels_compile_for_sm90_without_spilling():
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(",".join(map(str, variant)) for variant in VARIANTS)],
        capture_output=True, text=True, timeout=500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.strip().splitlines()]
    assert len(lines) == len(VARIANTS)
    for variant, registers, spilled, tensor_cores, wide in lines:
        assert int(spilled) == 0, variant
        assert int(registers) <= 255, variant
        assert int(tensor_cores) == variant.startswith("gemm"), variant
        assert int(wide), f"{variant}: codewords are not loaded 16 bytes at a time"
