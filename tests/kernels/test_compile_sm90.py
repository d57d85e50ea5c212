"""Every kernel variant compiles for an H100/H200 without spilling, as tight as it was when it was written."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import importlib.util
import sys
from pathlib import Path

from qcompiler.kernels.formats.affine import block_width
from qcompiler.kernels.triton.grouped.expert_rows import expert_tile

_FILE = Path(__file__).with_name("offline.py")
_SPEC = importlib.util.spec_from_file_location("qcompiler_tests_offline", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
offline = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = offline
_SPEC.loader.exec_module(offline)

POINTERS = {"low": "*i32", "high": "*i16", "scales": "*fp16", "zeros": "*fp16", "sides": "*i32"}
SIZES = {
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "GROUPS": "i32:16",
    "side_stride": "i32:16",
    "words": "i32:16",
    "x_stride": "i32:16",
}
PLANES = {2: 8, 3: 8, 4: 4, 5: 4, 6: 4, 8: 2}
HALF = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.bfloat16"}


def linear(
    kind, bits, group, dtype, block_n, block_m, warps=4, stages=3, split=1, width_of=4096, activation=None
):
    """A variant of the fused linears; all but gemv on prepared scales, that on the format's own."""
    width = block_width(bits, group, width_of)
    types = {**POINTERS, **SIZES, "tiles_per_split": "i32", "words_per_split": "i32:16"}
    types |= {"x": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}" if split == 1 else "*fp32"}
    if kind == "quads":
        types["x"] = "*i32"
    if bits == 5:
        types["high"] = "*u8"
    constants = {
        "BITS": bits,
        "GROUP": group,
        "WIDTH": width,
        "BN": block_n,
        "BM": block_m,
        "SPLIT": split,
        "HAS_BIAS": True,
        "HALF": HALF[dtype],
        "COMPILED": True,
    }
    if kind == "quads":
        constants |= {"SIDES": max(1, PLANES[bits] * width // group), "BW": 128 * warps, "STAGES": stages}
        constants["EVEN"] = width_of % 4096 == 0
        kernel = "linear.affine_quads:linear_affine_quads"
    elif kind == "dots":
        types |= {"low": "*i16", "high": "*i16", "row_words": "i32:16"}
        types.pop("words")
        constants |= {"SIDES": max(1, PLANES[bits] * width // group) if group else 1}
        constants |= {"BN": min(block_n, 16 * warps), "PARTS": max(1, block_n // (16 * warps))}
        constants["EVEN_K"] = width_of % 256 == 0
        kernel = "linear.affine_dots:linear_affine_dots"
    elif kind == "gemv":
        constants |= {"PAIRS": dtype != "fp32", "EVEN_K": width_of % 256 == 0}
        kernel = "linear.affine_gemv:linear_affine_gemv"
    else:
        constants |= {"WIDE": kind == "wide", "EVEN_K": width_of % 256 == 0}
        kernel = "linear.affine_gemm:linear_affine_gemm"
    if kind != "gemv":
        constants |= {"ACTIVATION": activation, "PDL": 2}
    kept = {name: type_ for name, type_ in types.items() if name not in constants}
    return offline.Variant(f"qcompiler.kernels.triton.{kernel}", kept, constants, warps, stages)


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
    kernel = "qcompiler.kernels.triton.grouped.affine:grouped_linear_affine_kernel"
    return offline.Variant(kernel, types, constants, warps, stages)


def gathered(bits, group, dtype, width_of=4096):
    types = {**POINTERS, **SIZES, "ids": "*i64", "out": f"*{dtype}", "tokens": "i32"}
    width = block_width(bits, group, width_of)
    constants = {"BITS": bits, "GROUP": group, "WIDTH": width, "BT": 8, "COMPILED": True}
    kernel = "qcompiler.kernels.triton.embedding_affine:embedding_affine_kernel"
    return offline.Variant(kernel, types, constants, 2)


def per_weight(variant, report):
    constants = variant.constants
    planes = 1 if constants.get("WIDE") else PLANES[constants["BITS"]]
    weights = (
        constants["BN"]
        * constants.get("PARTS", 1)
        * planes
        * (2 * constants["BW"] if "BW" in constants else constants["WIDTH"])
    )
    return sum(report.loop.values()) * 32 * variant.num_warps / weights


# Instructions per weight of the inner loop as counted with triton 3.6, and a tenth more.
LIMITS = {
    "gemm 4 bit bf16": (linear("gemm", 4, 64, "bf16", 64, 16), 4.1),
    "gemm 4 bit bf16, two row tiles": (linear("gemm", 4, 64, "bf16", 128, 16), 3.4),
    "gemm 4 bit fp16": (linear("gemm", 4, 64, "fp16", 64, 16), 4.1),
    "gemm 4 bit bf16, 64 tokens": (linear("gemm", 4, 128, "bf16", 64, 64), 4.6),
    "dots 4 bit bf16": (linear("dots", 4, 64, "bf16", 32, 8, 1, 3), 2.4),
    "dots 4 bit bf16, 16 tokens": (linear("dots", 4, 64, "bf16", 32, 16, 1, 3), 2.9),
    "dots 2 bit bf16": (linear("dots", 2, 64, "bf16", 32, 8, 2, 3), 2.9),
    "dots 3 bit bf16": (linear("dots", 3, 64, "bf16", 32, 8, 2, 3), 4.9),
    "quads 4 bit bf16": (linear("quads", 4, 64, "bf16", 8, 1, 2, 1), 4.1),
    "quads 2 bit bf16": (linear("quads", 2, 64, "bf16", 4, 1, 2, 1), 4.3),
    "quads 3 bit bf16": (linear("quads", 3, 64, "bf16", 4, 1, 2, 1), 5.7),
    "quads 8 bit bf16": (linear("quads", 8, 64, "bf16", 8, 1, 2, 1), 5.2),
    "gemv 4 bit fp32": (linear("gemv", 4, 64, "fp32", 64, 1, 4, 2), 7.0),
}
OTHERS = {
    **{f"gemm {bits} bit": linear("gemm", bits, 64, "bf16", 64, 16) for bits in (2, 3, 5, 6, 8)},
    "gemm fp16 8 bit": linear("gemm", 8, 64, "fp16", 64, 16),
    "gemm split": linear("gemm", 4, 64, "bf16", 64, 16, split=2),
    "gemm small groups": linear("gemm", 4, 16, "bf16", 64, 16),
    "gemm per channel": linear("gemm", 4, 0, "fp16", 64, 16),
    "gemm ragged": linear("gemm", 4, 64, "bf16", 64, 16, width_of=1000),
    "experts, blocks narrower than a dot": grouped(3, 32, "bf16", 8, width_of=77),
    "wide 4 bit": linear("wide", 4, 64, "bf16", 128, 128, 8, 3),
    "wide 4 bit, many tokens": linear("wide", 4, 64, "bf16", 128, 256, 8, 3),
    **{f"wide {bits} bit": linear("wide", bits, 64, "bf16", 128, 128, 8, 3) for bits in (2, 3, 5, 6, 8)},
    "dots 6 bit": linear("dots", 6, 64, "bf16", 16, 8, 1, 3),
    "dots fp16": linear("dots", 4, 64, "fp16", 64, 8, 2, 3),
    "dots split": linear("dots", 4, 64, "bf16", 32, 8, 1, 3, split=4),
    "dots small groups": linear("dots", 4, 16, "bf16", 32, 16, 1, 3),
    "dots per channel": linear("dots", 2, 0, "fp16", 32, 8, 2, 3),
    "dots ragged": linear("dots", 4, 64, "bf16", 32, 8, 1, 3, width_of=1000),
    "dots 32 tokens": linear("dots", 4, 64, "bf16", 64, 32, 4, 3),
    "quads, two tokens": linear("quads", 4, 64, "bf16", 4, 2, 2, 1),
    "quads ragged": linear("quads", 4, 64, "fp16", 8, 1, 2, 1, width_of=1000),
    "quads small groups": linear("quads", 2, 16, "bf16", 4, 1, 2, 1),
    "quads long groups": linear("quads", 8, 256, "bf16", 8, 1, 2, 1),
    **{f"quads {bits} bit": linear("quads", bits, 64, "bf16", 8, 1, 2, 1) for bits in (5, 6)},
    **{f"gemv {bits} bit": linear("gemv", bits, 64, "bf16", 16, 1, 4, 2) for bits in (2, 3, 5, 6, 8)},
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
        "qcompiler.kernels.triton.linear.affine_gemv:dequantize_affine_kernel",
        {**POINTERS, **SIZES, "out": "*bf16"},
        {"BITS": 4, "GROUP": 64, "WIDTH": 64, "BN": 32, "COMPILED": True},
    ),
    "dequantize prepared": offline.Variant(
        "qcompiler.kernels.triton.linear.affine_dense:dequantize_sides_kernel",
        {**POINTERS, **SIZES, "out": "*bf16"},
        {"BITS": 4, "GROUP": 64, "WIDTH": 64, "BN": 32, "HALF": "tl.bfloat16", "COMPILED": True},
    ),
    "sum of parts": offline.Variant(
        "qcompiler.kernels.triton.linear.affine_gemv:sum_partials",
        {"partials": "*fp32", "bias": "*bf16", "out": "*bf16", "MN": "i32", "N": "i32"},
        {"SPLIT": 4, "HAS_BIAS": True, "BLOCK": 512, "ACTIVATION": None, "PDL": 2},
    ),
    "gated sum of parts": offline.Variant(
        "qcompiler.kernels.triton.linear.affine_gemv:sum_partials",
        {"partials": "*fp32", "bias": "*bf16", "out": "*bf16", "MN": "i32", "N": "i32"},
        {"SPLIT": 2, "HAS_BIAS": False, "BLOCK": 512, "ACTIVATION": "silu", "PDL": 2},
    ),
    "quads gated": linear("quads", 4, 64, "bf16", 4, 1, 1, 1, activation="silu"),
    "dots gated": linear("dots", 4, 64, "bf16", 32, 8, 1, 3, activation="silu"),
    "gemm gated": linear("gemm", 4, 64, "bf16", 64, 16, activation="silu"),
    "gemm gated, 64 tokens": linear("gemm", 4, 64, "bf16", 128, 64, 8, activation="gelu"),
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


@pytest.mark.parametrize("name", [*LIMITS, *OTHERS])
def test_nothing_is_read_or_written_before_earlier_kernels_have_ended(reports, name):
    assert reports[name].early == []


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
