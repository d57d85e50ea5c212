"""A method and a format of another package, by entry points: compiled, run, refused where it is missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.artifact import open_artifact

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "plugin"


def install(source: Path, site: Path) -> Path:
    """Put a package into a folder as pip would: its files, and a .dist-info with its entry points."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    site.mkdir()
    shutil.copytree(source / "qcompiler_ternary", site / "qcompiler_ternary")
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    groups = project["entry-points"]
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that the package is installed in, on this process's path."""
    folder = install(PLUGIN, tmp_path_factory.mktemp("plugin") / "site")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def run(*args: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site or ""), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def artifact(site, tmp_path_factory) -> Path:
    """A random llama compiled with the plug-in's method into the plug-in's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import compile_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)).save_pretrained(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "models" / "tiny-llama" / name, folder / "llama")
    options = CompileOptions(
        str(folder / "llama"), method="ternary", bits=2, output=folder / "out", eval_tokens=0
    )
    compile_model(options)
    return folder / "out"


def test_an_artifact_in_a_foreign_format_is_made_and_run(artifact):
    from qcompiler.runtime.model import load

    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {layer["format"] for layer in manifest["layers"]} == {"ternary"}
    assert manifest["ops"]["format:ternary"] == 1
    graph = json.loads((artifact / "graph.json").read_text())
    names = [node["op"] for node in graph["nodes"] if "ternary" in node["op"]]
    # Siblings are merged by the format's own concat: q, k, v; o; gate, up; down.
    assert names == ["qcompiler.linear_ternary.default"] * 4
    assert load(artifact, device="cpu").generate("Once", max_tokens=4, temperature=0.0)


def test_without_the_package_the_artifact_is_refused(artifact):
    done = run("-m", "qcompiler.runtime.cli.main", "verify", str(artifact))
    assert done.returncode == 2
    assert "'ternary', which no installed package brings" in done.stderr


def test_a_foreign_op_is_not_run_without_its_declaration(site, tmp_path):
    """The op is registered in the process, but no entry point declares it."""
    undeclared = shutil.copytree(site, tmp_path / "site")
    (next(undeclared.glob("*.dist-info")) / "entry_points.txt").write_text("")
    code = (
        "import qcompiler_ternary.op; from qcompiler.runtime.opset import resolve\n"
        "from qcompiler.kernels.errors import ArtifactError\n"
        "try: resolve('qcompiler.linear_ternary.default', 'node')\n"
        "except ArtifactError as e: print(e)"
    )
    assert "not on the list" in run("-c", code, site=undeclared).stdout


def test_stored_tensors_of_a_foreign_format_are_checked(artifact, tmp_path):
    """The op would read beyond tensors that are smaller than its settings say."""
    from qcompiler.runtime.manifest import checksum

    root = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    graph = json.loads((root / "graph.json").read_text())
    next(node for node in graph["nodes"] if "ternary" in node["op"])["args"][-1] = 4096
    data = json.dumps(graph).encode()
    (root / "graph.json").write_bytes(data)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["graph.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["checksum"] = checksum(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"packed is torch\.uint8"):
        open_artifact(root)


def test_a_newer_format_than_the_installed_one_is_refused(artifact, site, monkeypatch):
    from qcompiler.kernels.formats import get_format

    monkeypatch.setattr(type(get_format("ternary")), "version", 0)
    with pytest.raises(ArtifactError, match="'format:ternary' version 1, this runtime has 0"):
        open_artifact(artifact)


def test_a_package_that_does_not_load_is_named(site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "site")
    (broken / "qcompiler_ternary" / "op.py").write_text("raise RuntimeError('no such driver')\n")
    code = (
        "from qcompiler.kernels.errors import InvalidInputError\n"
        "from qcompiler.kernels.formats import get_format\n"
        "assert get_format('affine').name == 'affine'\n"
        "try: get_format('ternary')\n"
        "except InvalidInputError as e: print(e)"
    )
    said = run("-c", code, site=broken).stdout
    assert "qcompiler_ternary.format:TERNARY" in said
    assert "no such driver" in said


def test_dequantized_and_computed_agree(site):
    from qcompiler.kernels.formats import get_format
    from qcompiler.methods.base import get_method

    torch.manual_seed(0)
    method, weight, x = get_method("ternary"), torch.randn(7, 13), torch.randn(3, 13)
    spec = method.resolve_spec(2)
    tensors = method.quantize(weight, spec)
    dense = get_format("ternary").dequantize(spec, tensors, 13, torch.float32)
    assert set(torch.unique(dense / tensors["scales"][:, None]).tolist()) <= {-1.0, 0.0, 1.0}
    op, args = get_format("ternary").op_call(spec, x, tensors, None, 13)
    torch.testing.assert_close(op(*args), torch.nn.functional.linear(x, dense))
    torch.library.opcheck(op, args)
