"""`--config`: our keys, the keys of LLaMA-Factory, and what is refused."""

from __future__ import annotations

import json

import pytest

from qcompiler.cli.main import qcompile, run


def call(tmp_path, capsys, text: str, *flags: str):
    """Write a configuration, plan it, and give (exit code, printed object or error text)."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    code = run(qcompile, ["--config", str(file), "--dry-run", "--json", *flags])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if code == 0 else printed.err


def test_the_keys_of_llama_factory(tmp_path, capsys, random_llama):
    text = f"model_name_or_path: {random_llama}\nquantization_bit: 4\nquantization_method: bitsandbytes\n"
    code, planned = call(tmp_path, capsys, text + "quantization_type: fp4\ndouble_quantization: false\n")
    assert code == 0
    assert planned["method"] == "bnb"
    assert planned["bits_per_weight_linears"] == pytest.approx(4.5, abs=0.01)  # no double quantization


def test_our_own_keys_and_lists(tmp_path, capsys, random_llama):
    text = f"model: {random_llama}\nmethod: rtn\nbits: [3, o_proj=8]\nskip: [down_proj]\nlm-head-bits: 6\n"
    code, planned = call(tmp_path, capsys, text)
    assert code == 0
    bits = {linear["name"].rpartition(".")[2]: linear["bits"] for linear in planned["linears"]}
    assert bits == {
        "q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 8, "gate_proj": 3, "up_proj": 3, "lm_head": 6,
    }  # fmt: skip


def test_flags_override_the_file(tmp_path, capsys, random_llama):
    text = f"model: {random_llama}\nmethod: rtn\nbits: 3\n"
    _, planned = call(tmp_path, capsys, text, "--bits", "8", "--method", "hqq")
    assert planned["method"] == "hqq"
    assert {linear["bits"] for linear in planned["linears"]} == {8}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("quantization_bits: 4\n", "quantization_bit"),
        ("methd: hqq\n", "method"),
        ("- a\n- b\n", "not a mapping"),
        ("bits: [4\n", "not YAML"),
    ],
)
def test_what_means_nothing_is_refused_with_the_nearest_name(tmp_path, capsys, text, told):
    code, error = call(tmp_path, capsys, text)
    assert code == 2
    assert told in error
