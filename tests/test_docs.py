"""What the documentation shows, works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_files_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:kernels|passes|runtime|qcompiler|tests|docs|benchmarks)/[\w/.-]+)`", text)
    assert named
    assert not [name for name in named if "<" not in name and not (ROOT / name).exists()]


def test_the_example_pass_does_what_its_docstring_says():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "passes.md").read_text(), flags=re.S)
    example = next(block for block in blocks if "class DropScaleByOne" in block)
    check = """
class Model(torch.nn.Module):
    def forward(self, x):
        return x * 1.0 + 2.0

graph = torch.export.export(Model(), (torch.ones(3),)).module(check_guards=False)
assert DropScaleByOne().run(graph).matched == 1
assert not [n for n in graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
assert torch.equal(graph(torch.ones(3)), torch.full((3,), 3.0))
"""
    subprocess.run([sys.executable, "-c", example + check], check=True, timeout=120)
