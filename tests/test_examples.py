"""Every example runs, as its docstring says, and shows what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(*arguments: str | Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_an_example_is_short_and_tested_here(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert f'"{path.name}"' in Path(__file__).read_text(encoding="utf-8")


def test_a_pass_in_a_users_pipeline():
    said = run(EXAMPLES / "custom_pass.py").splitlines()
    assert said[-1].split() == ["fuse_squared_relu", "1", "matched"]


def test_a_method_of_ones_own(tmp_path):
    said = run(EXAMPLES / "custom_method.py", EXAMPLES / "models" / "tiny-llama", tmp_path / "out")
    assert said.startswith("4.50 bits per weight, KL 0.")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["method"] == {"name": "clipped", "options": {"sigmas": 2.5}}


def test_an_encoder():
    values = [float(line.split()[0]) for line in run(EXAMPLES / "encoder.py").splitlines()]
    assert values[0] == pytest.approx(1.0, abs=1e-3)
    assert all(value < 1 for value in values[1:])


def test_the_yaml_and_an_engine_in_an_asyncio_program(tmp_path):
    out = tmp_path / "from-yaml"
    result = run("-m", "qcompiler.cli.main", "--config", EXAMPLES / "quantize.yaml", "-o", out, "--json")
    assert json.loads(result)["linears_quantized"] == 28
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["method"]["name"] == "bnb"
    *answers, last = run(EXAMPLES / "asyncio_service.py", out).splitlines()
    assert len(answers) == 4
    assert all(len(line.split("|")[1].split()) > 3 for line in answers)
    assert last.startswith("running 0, pages in use 0 of ")


def test_the_page_on_stacks_shows_what_works():
    text = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    assert "['0'] [('2', 'skip 2')]\n" in run("-c", code.replace('"method": "hqq"', '"compiler": "eager"'))
    package = (EXAMPLES / "plugin" / "pyproject.toml").read_text(encoding="utf-8")
    (declared,) = re.findall(r"```toml\n(.*?)```", text, flags=re.S)
    assert declared.strip() in package
