"""The lut4 and int8 kernels compile for sm_90 without a GPU: no spills, tensor cores used, lean loops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
_SCRIPT = Path(__file__).with_name("linear_variants.py")
_SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one program may have on sm_90


@pytest.fixture(scope="module")
def variants():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(_SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_nothing_spills_and_shared_memory_fits(variants):
    assert len(variants) >= 20
    assert [v for v in variants if v["spill_bytes"] or v["shared_bytes"] > _SHARED_LIMIT] == []


def test_products_run_on_the_tensor_cores_of_hopper(variants):
    gemms = [v for v in variants if v["kernel"].endswith("gemm")]
    assert {v["kernel"] for v in gemms} == {"linear_lut4_gemm", "linear_int8_gemm", "linear_llm_int8_gemm"}
    assert all(v["half_mma"] for v in gemms)
    assert all(v["integer_mma"] for v in gemms if v["kernel"] == "linear_llm_int8_gemm")


def test_products_of_experts_run_there_too_where_codes_are_decoded_in_registers(variants):
    experts = [v for v in variants if v["kernel"].startswith("grouped_")]
    assert {v["kernel"] for v in experts} == {"grouped_linear_lut4_kernel", "grouped_linear_int8_kernel"}
    assert {v["decoded"] for v in experts} == {True, False}
    assert all(v["half_mma"] for v in experts if v["decoded"])


def test_few_tokens_cost_few_instructions_per_weight(variants):
    limits = {"linear_lut4_gemv": (64, 4.5), "linear_int8_gemv": (32, 6.5)}  # weights per thread and round
    found = [v for v in variants if v["kernel"] in limits]
    assert len(found) >= 3
    for variant in found:
        weights, limit = limits[variant["kernel"]]
        assert sum(variant["loop"].values()) / weights <= limit
        assert not {"I2F", "I2FP"} & variant["loop"].keys()  # conversions run at a quarter of the rate
