"""What is refused before any work, and that nothing half-written is left."""

from __future__ import annotations

import pytest

from qcompiler.cli.main import main
from qcompiler.emit.onnx import files
from qcompiler.emit.onnx.check import check_formats
from qcompiler.emit.onnx.emit import OnnxOptions, emit_onnx
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.additive import AdditiveSpec
from qcompiler.runtime.artifact import open_artifact

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")


def qcompile(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def artifact(random_llama, tmp_path_factory):
    """A random model with zero points of any value."""
    out = tmp_path_factory.mktemp("onnx") / "model"
    assert qcompile(
        random_llama, "--bits", 4, "--group-size", 32, "--dtype", "float32", "--eval-tokens", 0, "-q",
        "-o", out,
    ) == 0  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--bits", "3"), "--bits 3"),
        (("--bits", "4", "--bits", "*.o_proj=6"), "--bits *.o_proj=6"),
        (("--bits", "4", "--lm-head-bits", "5"), "--lm-head-bits 5"),
        (("--method", "aqlm", "--bits", "2"), "--bits 2"),
        (("--bits", "4", "--hqq-solver", "reference"), "integer zero points"),
        (("--bits", "4", "--option", "zeros=float"), "integer zero points"),
    ],
)
def test_robustness_24_what_onnx_cannot_say_is_named_before_any_work(
    tiny_llama, tmp_path, monkeypatch, capsys, arguments, named
):
    monkeypatch.setattr("qcompiler.plan.capture", lambda *a, **k: pytest.fail("work was begun"))
    assert qcompile(tiny_llama, *arguments, "--emit", "artifact,onnx", "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert named in error
    assert "2, 4 or 8 bits" in error or "Drop" in error
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_is_refused_with_the_known_ones(tiny_llama, tmp_path, capsys):
    assert qcompile(tiny_llama, "--emit", "artifact,gguff", "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "gguff" in error
    assert "onnx" in error


def test_formats_without_an_operator_are_refused_by_layer_name():
    with pytest.raises(InvalidInputError, match=r"blocks\.0\.fc.*additive") as refused:
        check_formats([("blocks.0.fc", AdditiveSpec(2, 8, 8))])
    assert "hqq" in (refused.value.hint or "")


def test_destinations_are_not_overwritten_unless_told(artifact, tmp_path, capsys):
    out = tmp_path / "out"
    assert qcompile("emit", artifact, "--to", "onnx", "-o", out, "--eval-tokens", 0, "-q") == 0
    assert qcompile("emit", artifact, "--to", "onnx", "-o", out, "-q") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert qcompile("emit", artifact, "--to", "onnx", "-o", out, "--overwrite", "--eval-tokens", 0, "-q") == 0
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    assert qcompile("emit", artifact, "--to", "onnx", "-o", other, "--overwrite", "-q") == 2
    assert (other / "letter.txt").read_text() == "keep me"


def test_a_failure_in_the_middle_leaves_nothing(artifact, tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_external", fail)
    with pytest.raises(InvalidInputError, match="No space left"):
        emit_onnx(open_artifact(artifact), tmp_path / "out", OnnxOptions(zeros="float"))
    assert not list(tmp_path.iterdir())


def test_experts_are_refused_by_name(tmp_path, make_mixture, capsys):
    out = tmp_path / "out"
    assert qcompile(make_mixture(tmp_path / "moe"), "--bits", 4, "--emit", "artifact,onnx", "-o", out) == 2
    assert "mixtures of experts" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def make_mixture():
    """A tiny random mixtral."""

    def make(folder):
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(folder)
        return folder

    return make
