"""qrun: what each command prints, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qcompiler.runtime.cli.main import run


def qrun(capsys, *args):
    code = run([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def qrun_json(capsys, *args):
    code, out, _ = qrun(capsys, *args, "--json")
    assert code == 0
    assert out.count("\n") == 1
    return json.loads(out)


def test_generate(capsys, tiny_q4, q4_model):
    options = ("--max-tokens", 8, "--temperature", 0)
    result = qrun_json(capsys, "generate", tiny_q4, "--prompt", "Once upon a time", *options)
    (wanted,) = q4_model.complete(["Once upon a time"], max_tokens=8)
    assert result["text"] == wanted.text
    assert result["token_ids"] == wanted.token_ids
    assert result["tokens_per_second"] > 0
    code, out, err = qrun(capsys, "generate", tiny_q4, "--prompt", "Once upon a time", *options)
    assert (code, out, err) == (0, f"Once upon a time{wanted.text}\n", "")


def test_generate_several(capsys, tiny_q4, q4_model):
    result = qrun_json(capsys, "generate", tiny_q4, "-p", "One", "-p", "Two", "--max-tokens", 4)
    assert [r["text"] for r in result["results"]] == q4_model.generate(["One", "Two"], max_tokens=4)


def test_generate_reads_a_file(capsys, tiny_q4, q4_model, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve")
    result = qrun_json(
        capsys, "generate", tiny_q4, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 3
    )
    assert result["text"] == q4_model.generate("naïve", max_tokens=3)


def test_chat(capsys, tiny_q4, q4_model):
    result = qrun_json(capsys, "chat", tiny_q4, "--system", "Be brief.", "-m", "Hello", "--max-tokens", 5)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert result["text"] == q4_model.chat(messages, max_tokens=5)


def test_a_conversation_on_stdin(tiny_q4, q4_model):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qcompiler.runtime.cli.main",
            "chat",
            str(tiny_q4),
            "--max-tokens",
            "4",
            "--device",
            "cpu",
        ],
        input="Hello\nAnd you?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    first = q4_model.chat([{"role": "user", "content": "Hello"}], max_tokens=4)
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And you?"},
    ]
    assert done.stdout == first + "\n" + q4_model.chat(history, max_tokens=4) + "\n"


def test_eval(capsys, tiny_float, tmp_path):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    args = ("eval", tiny_float, "--text", tmp_path / "text.txt", "--context", 64, "--max-tokens", 100)
    result = qrun_json(capsys, *args)
    assert set(result) == {"perplexity", "nll", "tokens", "seconds"}
    assert result["tokens"] == 100
    code, out, _ = qrun(capsys, *args)
    assert code == 0
    assert f"{result['perplexity']:.4f}" in out


def test_bench(capsys, tiny_q4):
    sizes = ("--batch", "1,2", "--prompt-tokens", 8, "--decode-tokens", 4, "--repeats", 1)
    result = qrun_json(capsys, "bench", tiny_q4, *sizes)
    cold = result["cold_start"]
    phases = [cold[f"{name}_seconds"] for name in ("start", "verify", "weights", "cache")]
    assert min(phases) > 0
    assert sum(phases) == pytest.approx(cold["seconds"], abs=0.2)
    assert [r["batch"] for r in result["results"]] == [1, 2]
    assert all(
        r["prefill_tokens_per_second"] > 0 and r["decode_tokens_per_second"] > 0 for r in result["results"]
    )


def test_inspect(capsys, tiny_q4):
    result = qrun_json(capsys, "inspect", tiny_q4, "--tensors")
    assert result["model_type"] == "llama"
    assert result["formats"][0]["layers"] == 16
    assert result["ops"]["qcompiler.paged_attention.default"] == 4
    assert {"name": "model.norm.weight", "dtype": "float32", "shape": [256]} in result["tensors"]
    code, out, _ = qrun(capsys, "inspect", tiny_q4)
    assert code == 0
    assert "paged_attention" in out


def test_verify(capsys, tiny_q4, artifact):
    assert qrun_json(capsys, "verify", tiny_q4)["ok"] is True
    data = bytearray((artifact / "README.md").read_bytes())
    data[0] ^= 1
    (artifact / "README.md").write_bytes(bytes(data))
    code, out, err = qrun(capsys, "verify", artifact, "--json")
    assert (code, out) == (2, "")
    assert "README.md" in err


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "{q4}"),
        ("generate", "{q4}", "--prompt", "a", "--temperature", "nan"),
        ("generate", "{q4}", "--prompt", "a", "--max-tokens", "-1"),
        ("generate", "{q4}", "--prompt", "a", "--max-tokens", "many"),
        ("generate", "{q4}", "--prompt", "a", "--device", "cuda:99"),
        ("generate", "{q4}", "--prompt", "a " * 5000, "--max-tokens", "1"),
        ("generate", "no-such-folder", "--prompt", "a"),
        ("eval", "{q4}", "--text", "no-such-file"),
        ("eval", "{q4}"),
        ("chat", "{q4}", "--json"),
        ("bench", "{q4}", "--batch", "one"),
        ("bench", "{q4}", "--batch", "0"),
        ("no-such-command",),
        ("generate", "{q4}", "--no-such-option"),
    ],
)
def test_refused_input_is_exit_code_2_and_nothing_on_stdout(capsys, tiny_q4, args):
    code, out, err = qrun(capsys, *(a.replace("{q4}", str(tiny_q4)) for a in args))
    assert (code, out) == (2, "")
    assert err.strip()
    assert "Traceback" not in err


def test_our_own_fault_is_exit_code_1_with_a_traceback_on_demand(capsys, tiny_q4, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr("qcompiler.runtime.model.load", broken)
    code, out, err = qrun(capsys, "generate", tiny_q4, "--prompt", "a")
    assert (code, out) == (1, "")
    assert "RuntimeError: boom" in err
    assert "Traceback" not in err
    _, _, err = qrun(capsys, "generate", tiny_q4, "--prompt", "a", "-v")
    assert "Traceback" in err


def test_ctrl_c_is_quiet(capsys, tiny_q4, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompiler.runtime.model.load", interrupted)
    code, _, err = qrun(capsys, "generate", tiny_q4, "--prompt", "a")
    assert code == 130
    assert "Traceback" not in err


def test_help_needs_neither_torch_nor_rich():
    code = (
        "import sys; from qcompiler.runtime.cli.main import run; assert run(['--help']) == 0; "
        "assert not {'torch', 'rich', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for command in ("generate", "chat", "eval", "bench", "inspect", "verify"):
        assert command in done.stdout
