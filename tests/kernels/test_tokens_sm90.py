"""The kernels that choose, draw and hand on tokens compile for an H100/H200 without spilling."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

_SPEC = importlib.util.spec_from_file_location(
    "qcompiler_tests_offline", Path(__file__).with_name("offline.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
offline = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = offline
_SPEC.loader.exec_module(offline)

CHOICE = {"values": "*fp32", "indices": "*i32"}
TOKENS = {"tokens": "*i64", "kept": "*i64", "blocks": "i32"}
ROW = {"N": "i32:16", "stride": "i32:16"}
FEED = {"ids": "*i64", "feeds": "*i64", "kept": "*i64", "out": "*i64", "count": "i32"}
MASS = {"scores": "*fp32", "highest": "*fp32", "masses": "*fp64", "last": "*i32", "N": "i32", "stride": "i32"}
DRAW = {**MASS, "uniforms": "*fp64", "tokens": "*i64", "blocks": "i32"}


def variant(kernel, types, constants, warps):
    return offline.Variant(f"qcompiler.kernels.triton.{kernel}", types, constants, warps, 3)


def test_none_spills():
    variants = [
        variant("tokens:_partial_kernel", {"logits": "*bf16", **CHOICE, **ROW}, {"BLOCK": 2048}, 4),
        variant("tokens:_partial_kernel", {"logits": "*fp32", **CHOICE, **ROW}, {"BLOCK": 2048}, 4),
        variant("tokens:_final_kernel", {**CHOICE, **TOKENS}, {"BLOCKS": 64}, 1),
        variant("tokens:_feed_kernel", FEED, {"BLOCK": 256}, 2),
        variant("token_draw:_mass_kernel", MASS, {"BLOCK": 2048}, 8),
        variant("token_draw:_draw_kernel", DRAW, {"BLOCKS": 128, "BLOCK": 2048}, 8),
    ]
    reports = offline.compile_variants(variants)
    assert [report.spill_bytes for report in reports] == [0] * len(variants)
    assert max(report.registers for report in reports) <= 64
