"""The floors of the house: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# floor -> prefixes of ours that it may import
ALLOWED = {
    "kernels": ("qcompiler.kernels",),
    "passes": ("qcompiler.passes", "qcompiler.kernels"),
    "runtime": ("qcompiler.runtime", "qcompiler.kernels"),
}
# The server is an extra of its own; the rest of the runtime does without what it needs.
SERVER = {"pydantic", "fastapi", "starlette", "uvicorn", "prometheus_client"}
NEVER = {"transformers", "pickle", "cloudpickle", "dill"} | SERVER


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "qcompiler")
    return names


@pytest.mark.parametrize("floor", sorted(ALLOWED))
def test_a_floor_imports_only_what_lies_below(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        never = NEVER - SERVER if path.is_relative_to(ROOT / "runtime" / "server") else NEVER
        for name in imports_of(path):
            if name.split(".")[0] == "qcompiler" and name != "qcompiler":
                assert name.startswith(ALLOWED[floor]), f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in never, f"{path.relative_to(ROOT)} imports {name}"


def code_calls(path: Path) -> set[str]:
    calls: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func))
    return calls


def test_nothing_unpickles_or_evaluates_text():
    forbidden = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system", "compile"}
    for floor in (*ALLOWED, "qcompiler"):
        for path in (ROOT / floor).rglob("*.py"):
            assert not forbidden & code_calls(path), path.relative_to(ROOT)


def test_no_file_holds_more_than_one_idea():
    tracked = [p for f in (*ALLOWED, "qcompiler", "tests", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    too_long = {
        str(p.relative_to(ROOT)) for p in tracked if len(p.read_text(encoding="utf-8").splitlines()) > 600
    }
    assert not too_long


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


HEAVY = ("torch", "transformers", "numpy", "triton")


def seconds_of(code: str) -> float:
    """CPU seconds of a fresh interpreter that runs `code` and must end without a heavy package loaded."""
    check = f"; import sys, time; assert not set({HEAVY}) & set(sys.modules); print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", code + check], check=True, timeout=120, capture_output=True, text=True
    )
    return float(done.stdout.splitlines()[-1])


def test_the_package_is_imported_in_a_moment():
    assert seconds_of("import qcompiler, qcompiler.kernels") < 0.3


def test_the_help_is_there_in_a_moment():
    assert seconds_of("from qcompiler.cli.main import *; assert run(qcompile, ['--help']) == 0") < 1.5


def test_the_runtime_does_not_load_transformers():
    run_python(
        "import qcompiler.runtime, qcompiler.runtime.model, sys; assert 'transformers' not in sys.modules"
    )


def test_checks_survive_python_O():  # noqa: N802
    """Input is never checked with assert, which `python -O` removes."""
    for floor in (*ALLOWED, "qcompiler"):
        for path in (ROOT / floor).rglob("*.py"):
            asserts = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
            assert not asserts, f"{path.relative_to(ROOT)}: assert at lines {asserts}"
