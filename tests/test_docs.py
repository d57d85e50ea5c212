"""What the documentation shows, works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import Place, blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands of the front pages that are not run, by their beginning; other pages say it beside the block.
LEFT_OUT = {
    "README.md": (
        "make ",  # `make demo` makes what these tests begin with, `make test` runs them, the rest needs a GPU
        "pip ",  # what they install is what the tests run in
    ),
    "CONTRIBUTING.md": ("make ",),
}
# What stands for something of the reader's own.
PLACEHOLDERS = {"MODEL": "examples/models/tiny-llama", "FILE": "text.txt"}
BUILT = "qcompile examples/models/tiny-llama --method hqq --bits 4 -o build/tiny-llama-hqq-4bit --overwrite"


def page_id(page):
    return str(page.relative_to(ROOT).with_suffix("")).removeprefix("docs/")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the artifact that every page begins with."""
    pytest.importorskip("transformers")
    place = Place(tmp_path_factory.mktemp("docs"), ROOT, PLACEHOLDERS)
    (place.folder / "text.txt").write_text("Once upon a time there was a sea. " * 60)
    with place.page():
        place._command(BUILT, 0)
    return place


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.kind in ("shell", "python") for b in blocks(p))], ids=page_id
)
def test_the_commands_of_a_page_run(page, place, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setenv("NO_PROXY", "*")
    with place.page():
        for block in blocks(page):
            try:
                place.run(block, LEFT_OUT.get(page.name, ()))
            except Exception as error:
                raise AssertionError(f"{page.name}, line {block.line}: {error}") from error


def test_marks_say_why_and_are_read():
    marks = [b.marks["not run"] for p in PAGES for b in blocks(p) if "not run" in b.marks]
    assert marks
    assert all(mark == "gpu" or len(mark) > 10 for mark in marks)
    raw = sum(len(re.findall(r"^<!-- (?:not run|file|exits): ", p.read_text(), re.M)) for p in PAGES)
    assert raw == sum(len(b.marks) for p in PAGES for b in blocks(p))  # none stands where no block follows


def test_a_block_that_nobody_can_run_fails(place, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```sh\nfly --to moon\n```\n")
    (block,) = blocks(page)
    with pytest.raises(ValueError, match="not run"), place.page():
        place.run(block)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
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
    found = [b.text for b in blocks(ROOT / "docs" / "passes.md") if b.kind == "python"]
    example = next(text for text in found if "class DropScaleByOne" in text)
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


def test_the_serving_guide_names_every_option_limit_and_metric():
    pytest.importorskip("fastapi")
    from qcompiler.runtime.cli.serve import command
    from qcompiler.runtime.server.limits import Limits

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    options = [max(p.opts, key=len) for p in command.params if p.name not in ("artifact", "help")]
    assert not [name for name in options if f"`{name}`" not in text]
    limits = [f"| `{name}` | {field.default} |" for name, field in Limits.model_fields.items()]
    assert not [row for row in limits if row not in text]
    source = (ROOT / "runtime" / "server" / "metrics.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'\("([a-z_]+)", "', source)) | set(re.findall(r'"qcompiler_([a-z_]+)"', source))
    assert len(metrics) > 10
    assert not [name for name in metrics if f"`qcompiler_{name}" not in text]


def test_tables_are_those_of_the_results():
    from benchmarks.tables import stale

    assert stale() == []  # else: python -m benchmarks.tables


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {p.parent.relative_to(tmp_path) for p in tmp_path.rglob("index.html")}
    assert len(pages) == len(list((ROOT / "docs").rglob("*.md")))
