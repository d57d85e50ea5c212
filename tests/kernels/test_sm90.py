"""The op kernels compile for sm_90 without a GPU: no spills, shared memory that fits, tensor cores in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("sm90_variants.py")
_SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one program may have on sm_90
_ELEMENTWISE = {"rms_norm", "layer_norm", "silu", "gelu", "kv_append", "rotary", "rotary_kv_append"}
_QUANTIZED = {"prefill_quantized", "decode_quantized", "dequantize_pages"}
_APPENDS = {"kv_append_quantized", "rotary_kv_append_quantized"}
# Kernels of a decode step: they start while the ones before them still run.
_EARLY = _ELEMENTWISE | _APPENDS | {"decode", "decode_quantized", "combine"}


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


def test_every_kernel_compiles(variants):
    attention = {"prefill", "decode", "combine"}
    wanted = attention | _QUANTIZED | _APPENDS | _ELEMENTWISE | {"grouped_linear"}
    assert {v["kernel"] for v in variants} == wanted


def test_nothing_spills(variants):
    assert [v for v in variants if v["spill_bytes"]] == []


def test_shared_memory_fits(variants):
    assert [v for v in variants if v["shared_bytes"] > _SHARED_LIMIT] == []


def test_16_bit_prefill_runs_on_the_tensor_cores_of_hopper(variants):
    prefill = [v for v in variants if v["kernel"].startswith("prefill") and v["element"] != "fp32"]
    assert all(v["wgmma"] >= 2 for v in prefill)


def test_keys_and_values_are_loaded_while_others_are_computed_with(variants):
    # one buffer would mean that a tile is loaded only once the one before it is done with
    pipelined = ("prefill", "decode", "prefill_quantized", "decode_quantized")
    cached = [v for v in variants if v["kernel"] in pipelined and v["element"] != "fp32"]
    assert [v for v in cached if v["fewest_buffers"] < 2] == []


def test_codes_reach_the_matrix_unit_of_decode_from_registers(variants):
    # stores to shared memory: the weights of the second product and the sums over warps, no dequantized tile
    decode = [v for v in variants if v["kernel"] == "decode_quantized" and v["element"] != "fp32"]
    assert [v for v in decode if v["shared_stores"] > 12] == []


def test_memory_bound_kernels_never_load_single_elements(variants):
    # the norm of one attention head loads its short weight once for 16 rows
    wide = [v for v in variants if v["kernel"] in _ELEMENTWISE and v["columns"] != 128]
    assert [v for v in wide if v["narrow_loads"]] == []


def test_nothing_is_read_or_written_before_earlier_kernels_have_ended(variants):
    early = [v for v in variants if v["kernel"] in _EARLY]
    assert [v for v in early if not v["waits"] or v["memory_before_wait"]] == []
