"""The benchmarks run where there is a GPU; that they still fit the code they measure is seen anywhere."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MODULES = sorted(
    p.stem for p in (Path(__file__).parent.parent / "benchmarks").glob("*.py") if p.stem != "clients"
)


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_can_be_imported(module):
    importlib.import_module(f"benchmarks.{module}")


@pytest.mark.parametrize("name", ["b4-g64", "nf4", "eetq", "llm-int8", "aqlm-2x8", "tail-b3-f0.005"])
def test_every_case_of_the_linears_has_a_key_and_configurations(name):
    cases = importlib.import_module("qcompiler.kernels.tuning.linear_cases")
    case = cases.parse_case(name)
    for tokens in (1, 16, 2048):
        tried = cases.candidates(case, tokens, 4096, 14336, thorough=False)
        assert len(set(tried)) == len(tried)
        assert bool(tried) == (case.key(4096, 14336, tokens) is not None)
