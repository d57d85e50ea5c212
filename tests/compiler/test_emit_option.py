"""`qcompile --emit`: what stands beside the artifact, and what is refused before any work."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401  registers the ops
from qcompiler.cli.main import qcompile, run


def test_pt2_stands_beside_the_artifact(random_llama, tmp_path):
    out = tmp_path / "out"
    arguments = [str(random_llama), "-o", str(out), "--method", "rtn", "--eval-tokens", "0", "-q"]
    assert run(qcompile, [*arguments, "--emit", "artifact,pt2"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.pt2"]
    program = torch.export.load(tmp_path / "out.pt2")
    assert any("linear_affine" in str(node.target) for node in program.graph.nodes)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert run(qcompile, [*arguments, "--emit", "artifact,pt2"]) == 2  # out.pt2 is still there


@pytest.mark.parametrize(
    ("value", "words"),
    [("artifact,gguf2", "nothing 'gguf2' to emit"), ("", "names nothing")],
)
def test_what_is_not_emitted_is_refused(value, words, random_llama, tmp_path, capsys):
    assert run(qcompile, [str(random_llama), "-o", str(tmp_path / "out"), "--emit", value]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
