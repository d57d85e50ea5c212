"""The search compiles for an H100/H200 without spilling, its rounds as short as when they were written."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from test_compile_sm90 import offline

from qcompiler.kernels.triton.search.affine_search import tile_of

ELEMENT = {"bf16": 2, "fp32": 4}


def variant(size, dtype="bf16", *, even=True, search=True):
    tile = tile_of(size, ELEMENT[dtype], even=even)
    types = {
        "weight": f"*{dtype}", "inverse": "*fp32", "inverse_square": "*fp32",
        "codes": "*u8", "scales": "*fp16", "zeros": "*fp16",
        "N": "i32:16", "K": "i32:16", "clip_low": "fp32", "clip_step": "fp32",
    }  # fmt: skip
    constants = {
        "BITS": 4, "SIZE": size, "SEARCH": search, "CLIPS": 5, "ROUNDS": 2, "LAST_ROUNDS": 3,
        "SMALLEST": 2.0**-24, "LARGEST": 65504.0, "LIMIT": 65504.0, "EVEN": even,
        "L": tile.lanes, "R": tile.rows, "C": tile.chunks, "E": tile.run, "COMPILED": True,
    }  # fmt: skip
    kernel = "qcompiler.kernels.triton.search.affine_search:affine_search_kernel"
    return offline.Variant(kernel, types, constants, tile.warps)


def packing(low_bits, high_bits, width, *, even=True):
    types = {"codes": "*u8", "low": "*i32", "high": "*i16", "K": "i32:16", "words": "i32:16"}
    constants = {
        "WIDTH": width, "PLANES": 16 // low_bits, "LOW_BITS": low_bits, "HIGH_BITS": high_bits, "EVEN": even,
        "TILE": 512,
    }  # fmt: skip
    kernel = "qcompiler.kernels.triton.search.affine_pack:affine_pack_kernel"
    return offline.Variant(kernel, types, constants)


# Instructions per weight and round as counted with triton 3.6, and a twentieth more.
LIMITS = {
    "groups of 16": (variant(16), 11.2),
    "groups of 32": (variant(32), 9.4),
    "groups of 64": (variant(64), 8.5),
    "groups of 128": (variant(128), 9.6),
    "groups of 256": (variant(256), 9.7),
    "groups of 64, fp32": (variant(64, "fp32"), 8.7),
    "groups of 128, a short last one": (variant(128, even=False), 9.6),
}
OTHERS = {
    "rounding": variant(64, search=False),
    "column sums": offline.Variant(
        "qcompiler.kernels.triton.search.column_statistics:column_sums_kernel",
        {"weight": "*bf16", "sums": "*fp32", "bounds": "*fp32", "N": "i32:16", "K": "i32:16"}
        | {"rows_per_split": "i32:16"},
        {"ROWS": 16, "COLUMNS": 256},
    ),
    "column sizes": offline.Variant(
        "qcompiler.kernels.triton.search.column_statistics:column_sizes_kernel",
        dict.fromkeys(("sums", "bounds", "inverse", "inverse_square", "summary"), "*fp32")
        | dict.fromkeys(("K", "splits", "programs"), "i32:16")
        | dict.fromkeys(("factor", "limit"), "fp32"),
        {"SPLITS": 16, "PROGRAMS": 1024, "COLUMNS": 1024},
        16,
    ),
    "packing 4 bits": packing(4, 0, 64),
    "packing 3 bits": packing(2, 1, 32),
    "packing 8 bits, ragged": packing(8, 0, 64, even=False),
}


@pytest.fixture(scope="module")
def reports():
    variants = {name: variant for name, (variant, _) in LIMITS.items()} | OTHERS
    return dict(zip(variants, offline.compile_variants(list(variants.values())), strict=True))


@pytest.mark.parametrize("name", [*LIMITS, *OTHERS])
def test_no_register_spills(reports, name):
    assert reports[name].spill_bytes == 0


@pytest.mark.parametrize("name", LIMITS)
def test_instructions_per_weight_and_round(reports, name):
    variant, limit = LIMITS[name]
    constants = variant.constants
    weights = constants["SIZE"] * constants["R"] * constants["ROUNDS"]
    assert sum(reports[name].loop.values()) * 32 * variant.num_warps / weights <= limit


@pytest.mark.parametrize("name", LIMITS)
def test_a_group_stays_in_registers(reports, name):
    """Sums cross lanes by shuffles if at all: nothing in the loop goes through memory."""
    assert not {"LDS", "STS", "LDL", "STL", "LDG", "BAR"} & reports[name].loop.keys()
