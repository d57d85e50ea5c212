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
_ELEMENTWISE = {"rms_norm", "layer_norm", "silu", "gelu", "kv_append", "rotary"}


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
    assert {v["kernel"] for v in variants} == attention | _ELEMENTWISE | {"grouped_linear"}


def test_nothing_spills(variants):
    assert [v for v in variants if v["spill_bytes"]] == []


def test_shared_memory_fits(variants):
    assert [v for v in variants if v["shared_bytes"] > _SHARED_LIMIT] == []


def test_16_bit_prefill_runs_on_the_tensor_cores_of_hopper(variants):
    assert all(v["wgmma"] >= 2 for v in variants if v["kernel"] == "prefill" and v["element"] == "bf16")


def test_memory_bound_kernels_never_load_single_elements(variants):
    # the norm of one attention head loads its short weight once for 16 rows
    wide = [v for v in variants if v["kernel"] in _ELEMENTWISE and v["columns"] != 128]
    assert [v for v in wide if v["narrow_loads"]] == []
