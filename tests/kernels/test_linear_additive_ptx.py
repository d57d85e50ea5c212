"""The Gluon kernels of additive linears as compiled for an H100, run here by an interpreter of their PTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec
from qcompiler.kernels.formats.additive import num_groups
from qcompiler.kernels.ops.linear_additive_slices import pack_slices

HERE = Path(__file__).parent
# (bits, codebooks, dtype, rows, tile: rows, groups; tokens, warps, in features, tokens per tile, parts of K)
BOOKS = [
    (8, 1, "bf16", 130, 128, 32, 1, 8, 776, 8, 2),
    (8, 2, "bf16", 130, 128, 32, 3, 4, 512, 8, 1),
    (8, 2, "fp16", 37, 64, 16, 9, 4, 300, 16, 2),
    (8, 3, "fp16", 130, 128, 16, 2, 8, 160, 8, 1),
    (8, 4, "bf16", 40, 64, 16, 1, 4, 200, 8, 1),
    (12, 1, "fp16", 40, 64, 32, 3, 4, 320, 8, 1),
    (12, 2, "fp16", 40, 64, 16, 1, 4, 160, 8, 1),
]
SLICES = [
    ("bf16", 300, 256, 3, 16, 300, 8, 1, 2),
    ("fp16", 130, 64, 9, 4, 1100, 16, 2, 1),
]  # (dtype, rows, tile of rows, tokens, warps, in features, tokens per tile, parts of K, workers)

SCRIPT = """
import json, sys
from offline import compile_sm90
from qcompiler.kernels.triton.linear.additive_books import (
    book_layouts, copies, in_words, linear_additive_books
)
from qcompiler.kernels.triton.linear.additive_slices import linear_additive_slices, slice_layouts

made = []
books, slices = json.load(sys.stdin)
common = dict(scales="*fp16", out="*fp32", M="i32", N="i32", columns="i32")
for bits, count, half, _, bn, bg, _, warps, k, bm, _ in books:
    tail = 2 if k % 8 else int(k % (8 * bg) != 0)
    types = common | dict(x="*" + half, codes="*i32" if in_words(bits, count) else "*u8", codebooks="*fp16",
                          bias="*" + half, K="i32", G="i32", x_stride="i32:16", tiles_per_split="i32")
    constants = dict(BITS=bits, COUNT=count, COPIES=copies(bits), BN=bn, BG=bg, BM=bm, WARPS=warps,
                     TAIL=tail, HAS_BIAS=True) | book_layouts(bn, bg, bits, count, warps)
    made.append(compile_sm90(linear_additive_books, types, constants, num_warps=warps))
for half, _, bn, _, warps, _, bm, _, _ in slices:
    types = common | dict(x="*" + half, codes="*i16", tables="*i32", table_scale="*fp32", G="i32:16",
                          splits="i32", workers="i32")
    constants = dict(BN=bn, BG=64, BM=bm, WARPS=warps) | slice_layouts(bn, 64, warps)
    made.append(compile_sm90(linear_additive_slices, types, constants, num_warps=warps))
json.dump([(one.ptx, one.shared_bytes) for one in made], sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([BOOKS, SLICES]), capture_output=True, text=True,
        timeout=500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def quantized(spec: AdditiveSpec, n: int, k: int) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, spec.codewords, (n, num_groups(8, k), spec.codebooks))
    books = torch.randn(spec.codebooks, spec.codewords, 8)
    return ADDITIVE.pack(spec, codes, books, torch.rand(n) + 0.5)


def array(tensor: torch.Tensor):
    plain = tensor.contiguous()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()


@pytest.mark.parametrize("case", range(len(BOOKS)))
def test_codebooks_in_shared_memory(case, compiled):
    from ptx import Machine

    bits, count, half, n, bn, bg, tokens, warps, k, _, splits = BOOKS[case]
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    spec = AdditiveSpec(count, bits)
    tensors = quantized(spec, n, k)
    # Rows are 16 values further apart than they need, NaN between them.
    x = torch.full((tokens, -(-k // 16) * 16 + 16), float("nan")).to(dtype)
    x[:, :k] = torch.randn(tokens, k)
    bias = torch.randn(n).to(dtype)
    out = torch.full((splits, tokens, n), float("nan"))
    by_words = bits == 12 or count == 3
    codes = tensors["codes"].view(torch.int32) if by_words else tensors["codes"]
    groups = num_groups(8, k)
    tiles = -(-groups // bg)
    per_split = -(-tiles // splits)
    text, shared = compiled[case]
    arrays = [array(t) for t in (x, codes, tensors["codebooks"], tensors["scales"], bias, out)]
    sizes = [tokens, n, k, groups, codes.shape[1], x.stride(0), per_split]
    Machine(text, arrays + sizes, 32 * warps, shared).run((-(-n // bn), splits))
    dense = ADDITIVE.dequantize(spec, tensors, k, torch.float64)
    wanted = x[:, :k].double() @ dense.T + splits * bias.double()
    # Codewords are rounded to x's dtype, float16 holds them exactly; sums are float32.
    tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    assert (out.double().sum(0) - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("case", range(len(SLICES)))
def test_slices_of_a_codebook_in_shared_memory(case, compiled):
    from ptx import Machine

    half, n, _, tokens, warps, k, _, splits, workers = SLICES[case]
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    spec = AdditiveSpec(1, 16)
    tensors = quantized(spec, n, k)
    packed = pack_slices(tensors["codebooks"])
    groups = -(-num_groups(8, k) // 64) * 64
    x = torch.zeros(tokens, 8 * groups).to(dtype)
    x[:, :k] = torch.randn(tokens, k)
    sliced = x.view(tokens, groups, 4, 2).permute(2, 0, 1, 3)
    out = torch.full((4 * splits, tokens, n), float("nan"))
    text, shared = compiled[len(BOOKS) + case]
    tables = packed["tables"].flatten().view(torch.int32)
    parts = (sliced, tensors["codes"], tables, packed["table_scale"], tensors["scales"], out)
    sizes = [tokens, n, groups, tensors["codes"].shape[1], splits, workers]
    Machine(text, [array(t) for t in parts] + sizes, 32 * warps, shared).run((4 * workers, 1))
    dense = ADDITIVE.dequantize(spec, tensors | {"codebooks": packed["codebooks"]}, k, torch.float64)
    wanted = x[:, :k].double() @ dense.T
    # Both dtypes hold an int8 exactly; sums are float32.
    assert (out.double().sum(0) - wanted).norm() / wanted.norm() < 1e-6
