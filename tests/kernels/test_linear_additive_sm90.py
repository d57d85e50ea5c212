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
from qcompiler.kernels.triton.linear import additive_kernels as kernels

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


# (kernel, bits, books, tokens per tile), and what the heuristics choose: rows, groups, warps
TABLES = [
    ("books", 8, 1, 8, 128, 32, 4),
    ("books", 8, 2, 8, 128, 32, 4),
    ("books", 8, 2, 16, 128, 16, 4),
    ("books", 8, 2, 32, 128, 16, 8),
    ("books", 8, 3, 8, 128, 16, 8),
    ("books", 8, 4, 8, 256, 16, 16),
    ("books", 12, 1, 8, 128, 32, 4),
    ("books", 12, 2, 8, 256, 16, 16),
    ("slices", 16, 1, 8, 256, 64, 16),
    ("slices", 16, 1, 16, 256, 64, 16),
    ("slices", 16, 1, 32, 128, 64, 8),
]

TABLE_SCRIPT = """
import sys
from offline import compile_sm90
from qcompiler.kernels.triton.linear.additive_books import (
    book_layouts, books_config, copies, groups_of_tile, in_words, linear_additive_books
)
from qcompiler.kernels.triton.linear.additive_slices import (
    linear_additive_slices, slice_layouts, slices_config
)

for variant in sys.argv[1:]:
    name, *numbers = variant.split(",")
    bits, count, tokens, rows, groups, warps = map(int, numbers)
    if name == "books":
        config = books_config(tokens, 4096, 14336, bits, count, 132)
        assert groups_of_tile(bits, count, tokens) == groups
    else:
        config = slices_config(tokens, 4096, 14336, 132)
    assert (config.block_n, config.num_warps) == (rows, warps), config
    types = dict(x="*bf16", scales="*fp16", out="*fp32", M="i32", N="i32:16", G="i32:16", columns="i32:16")
    constants = dict(BN=rows, BG=groups, BM=tokens, WARPS=warps)
    if name == "books":
        kernel = linear_additive_books
        types |= dict(codes="*i32" if in_words(bits, count) else "*u8", codebooks="*fp16",
                      bias="*bf16", K="i32:16", x_stride="i32:16", tiles_per_split="i32")
        constants |= dict(BITS=bits, COUNT=count, COPIES=copies(bits), TAIL=0, HAS_BIAS=False)
        constants |= book_layouts(rows, groups, bits, count, warps)
    else:
        kernel = linear_additive_slices
        types |= dict(codes="*i16", tables="*i32", table_scale="*fp32", splits="i32", workers="i32")
        constants |= slice_layouts(rows, groups, warps)
    made = compile_sm90(kernel, types, constants, num_warps=warps)
    loop = made.loop_opcodes()
    lookups = sum(code.startswith("LDS.128" if name == "books" else "LDS.U16") for code in loop)
    products = sum(code.startswith("HMMA") for code in loop)
    narrow = sum(code.startswith("LDG") and not code.endswith(("64", "128")) for code in loop)
    lines = made.sass.splitlines()
    barrier = max(i for i, line in enumerate(lines) if " BAR.SYNC" in line)
    early = sum(" LDS." in line for line in lines[:barrier])
    print(variant, made.registers, made.spill_bytes, made.shared_bytes, len(loop), lookups, products, narrow,
          early)
"""


def test_kernels_with_a_table_in_shared_memory_compile_for_sm90():
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", TABLE_SCRIPT, *(",".join(map(str, variant)) for variant in TABLES)],
        capture_output=True, text=True, timeout=500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.strip().splitlines()]
    assert len(lines) == len(TABLES)
    for (name, bits, count, tokens, rows, groups, warps), (variant, *numbers) in zip(
        TABLES, lines, strict=True
    ):
        registers, spilled, shared, length, lookups, products, narrow, early = map(int, numbers)
        assert spilled == 0, variant
        assert registers <= 255, variant
        # The table alone, so that it stands where the kernel looks for it.
        table = 2 * 65536 if name == "slices" else count * (16 << bits) * (8 if bits == 8 else 1)
        assert shared == table, variant
        assert early == 0, f"{variant}: a look-up stands before the table is complete"
        # A look-up per code, and nothing of the weight anywhere but in registers.
        assert lookups == count * rows * groups // (32 * warps), variant
        assert products == lookups // (1 if name == "books" else 4) * (tokens // 8), variant
        assert length < ((15 + tokens) if name == "books" else 17) * lookups, variant
        assert narrow == 0 or bits == 12 or count == 3, variant
