"""The streaming GEMM compiles for sm_90 without a GPU: products run while the next operand is decoded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
_SCRIPT = Path(__file__).with_name("stream_variants.py")


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


def test_nothing_spills_and_as_many_programs_as_planned_share_a_multiprocessor(variants):
    assert len(variants) == 6
    assert [v for v in variants if v["spill_bytes"]] == []
    # of 228 KB each program takes 1 KB besides its own
    assert [v for v in variants if (v["shared_bytes"] + 1024) * v["programs"] > 228 * 1024] == []


def test_one_product_is_running_while_the_next_operand_is_decoded(variants):
    # One wait for all at the end of a tile; an assembler that gives up overlapping waits after each product.
    assert all(v["products"] == 16 * (v["variant"][3] // (16 * v["variant"][5])) for v in variants)
    assert all(v["waits"].count(0) == 1 for v in variants)
    assert all(set(v["waits"]) == {0, 1} for v in variants)


def test_operands_do_not_pass_through_shared_memory(variants):
    assert [v for v in variants if v["stores"] > 2] == []
