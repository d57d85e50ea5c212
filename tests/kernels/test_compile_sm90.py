"""Every kernel variant compiles for an H100/H200 without spilling, as tight as it was when it was written."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import importlib.util
import sys
from pathlib import Path

from qcompiler.kernels.formats.affine import block_width
from qcompiler.kernels.triton.expert_rows import expert_tile

_FILE = Path(__file__).with_name("offline.py")
_SPEC = importlib.util.spec_from_file_location("qcompiler_tests_offline", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
offline = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = offline
_SPEC.loader.exec_module(offline)

POINTERS = {"low": "*i32", "high": "*i16", "scales": "*fp16", "zeros": "*fp16"}
SIZES = {
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "GROUPS": "i32:16",
    "words": "i32:16",
    "x_stride": "i32:16",
}
PLANES = {2: 8, 3: 8, 4: 4, 5: 4, 6: 4, 8: 2}
HALF = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.bfloat16"}


def linear(kind, bits, group, dtype, block_n, block_m, warps=4, stages=3, split=1, width_of=4096):
    types = {**POINTERS, **SIZES, "tiles_per_split": "i32"}
    types |= {"x": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}" if split == 1 else "*fp32"}
    if bits == 5:
        types["high"] = "*u8"
    constants = {
        "BITS": bits,
        "GROUP": group,
        "WIDTH": block_width(bits, group, width_of),
        "BN": block_n,
        "BM": block_m,
        "SPLIT": split,
        "EVEN_K": width_of % 256 == 0,
        "HAS_BIAS": True,
        "HALF": HALF[dtype],
        "COMPILED": True,
    }
    if kind == "gemv":
        constants["PAIRS"] = dtype != "fp32"
    return offline.Variant(
        f"qcompiler.kernels.triton.linear_affine_{kind}:linear_affine_{kind}", types, constants, warps, stages
    )


def grouped(bits, group, dtype, tokens, width_of=4096):
    itemsize = 4 if dtype == "fp32" else 2
    block_n, block_m, warps, stages = expert_tile(tokens, 8, itemsize)
    types = {**POINTERS, **SIZES, "rows": "i32", "offsets": "*i32"}
    types |= dict.fromkeys(("x", "bias", "out"), f"*{dtype}")
    if bits == 5:
        types["high"] = "*u8"
    constants = {
        "EXPERTS": 8,
        "EXPERTS_P2": 16,
        "BITS": bits,
        "GROUP": group,
        "WIDTH": block_width(bits, group, width_of),
        "BN": block_n,
        "BM": block_m,
        "EVEN_K": width_of % 256 == 0,
        "HAS_BIAS": True,
        "HALF": "tl.bfloat16" if dtype == "bf16" else "tl.float16",
        "COMPILED": dtype != "fp32",
    }
    kernel = "qcompiler.kernels.triton.grouped_linear_affine:grouped_linear_affine_kernel"
    return offline.Variant(kernel, types, constants, warps, stages)


def gathered(bits, group, dtype, width_of=4096):
    types = {**POINTERS, **SIZES, "ids": "*i64", "out": f"*{dtype}", "tokens": "i32"}
    width = block_width(bits, group, width_of)
    constants = {"BITS": bits, "GROUP": group, "WIDTH": width, "BT": 8, "COMPILED": True}
    kernel = "qcompiler.kernels.triton.embedding_affine:embedding_affine_kernel"
    return offline.Variant(kernel, types, constants, 2)


def per_weight(variant, report):
    weights = variant.constants["BN"] * variant.constants["WIDTH"] * PLANES[variant.constants["BITS"]]
    return sum(report.loop.values()) * 32 * variant.num_warps / weights


# Instructions per weight of the inner loop as counted with triton 3.6, and a tenth more.
LIMITS = {
    "gemm 4 bit bf16": (linear("gemm", 4, 64, "bf16", 64, 16), 4.5),
    "gemm 4 bit bf16, two row tiles": (linear("gemm", 4, 64, "bf16", 128, 16), 3.5),
    "gemm 4 bit fp16": (linear("gemm", 4, 64, "fp16", 64, 16), 4.5),
    "gemm 4 bit bf16, 64 tokens": (linear("gemm", 4, 128, "bf16", 64, 64), 4.8),
    "gemm 4 bit bf16, prefill": (linear("gemm", 4, 64, "bf16", 128, 128, 8, 2), 4.4),
    "gemv 4 bit bf16": (linear("gemv", 4, 64, "bf16", 64, 1, 4, 2), 6.2),
}
OTHERS = {
    **{f"gemm {bits} bit": linear("gemm", bits, 64, "bf16", 64, 16) for bits in (2, 3, 5, 6, 8)},
    "gemm fp16 8 bit": linear("gemm", 8, 64, "fp16", 64, 16),
    "gemm split": linear("gemm", 4, 64, "bf16", 64, 16, split=2),
    "gemm small groups": linear("gemm", 4, 16, "bf16", 64, 16),
    "gemm per channel": linear("gemm", 4, 0, "fp16", 64, 16),
    "gemm ragged": linear("gemm", 4, 64, "bf16", 64, 16, width_of=1000),
    **{f"gemv {bits} bit": linear("gemv", bits, 64, "bf16", 64, 1, 4, 2) for bits in (2, 3, 5, 6, 8)},
    "gemv fp32": linear("gemv", 4, 64, "fp32", 16, 4, 4, 2),
    "gemv fp32 ragged": linear("gemv", 4, 64, "fp32", 16, 4, 4, 2, width_of=1000),
    **{f"experts {bits} bit": grouped(bits, 64, "bf16", 8) for bits in (2, 3, 4, 5, 6, 8)},
    "experts fp16": grouped(8, 128, "fp16", 64),
    "experts fp32": grouped(4, 64, "fp32", 64),
    "experts prefill": grouped(4, 64, "bf16", 8192),
    "experts ragged": grouped(4, 16, "bf16", 8, width_of=1000),
    "embedding 4 bit": gathered(4, 64, "bf16"),
    "embedding 8 bit ragged": gathered(8, 0, "fp16", width_of=1000),
    "dequantize": offline.Variant(
        "qcompiler.kernels.triton.linear_affine_gemv:dequantize_affine_kernel",
        {**POINTERS, **SIZES, "out": "*bf16"},
        {"BITS": 4, "GROUP": 64, "WIDTH": 64, "BN": 32, "COMPILED": True},
    ),
    "sum of parts": offline.Variant(
        "qcompiler.kernels.triton.linear_affine_gemv:sum_partials",
        {"partials": "*fp32", "bias": "*bf16", "out": "*bf16", "MN": "i32", "N": "i32"},
        {"SPLIT": 4, "HAS_BIAS": True, "BLOCK": 512},
    ),
}


@pytest.fixture(scope="module")
def reports():
    variants = {name: variant for name, (variant, _) in LIMITS.items()} | OTHERS
    return dict(zip(variants, offline.compile_variants(list(variants.values())), strict=True))


@pytest.mark.parametrize("name", [*LIMITS, *OTHERS])
def test_no_register_spills(reports, name):
    report = reports[name]
    assert report.spill_bytes == 0
    assert report.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("name", LIMITS)
def test_instructions_per_weight(reports, name):
    variant, limit = LIMITS[name]
    assert per_weight(variant, reports[name]) <= limit


@pytest.mark.parametrize("name", [name for name in LIMITS if name.startswith("gemm")])
def test_weights_reach_the_tensor_cores_from_registers(reports, name):
    """wgmma runs, and no dequantized weight goes through shared memory first (STS)."""
    loop = reports[name].loop
    assert loop.get("HGMMA", 0) >= 8
    assert loop.get("STS", 0) + loop.get("STSM", 0) <= 8
