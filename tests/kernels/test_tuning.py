"""Tuning tables: found by GPU and key, refused when damaged, and a heuristic that always has an answer."""

from __future__ import annotations

import json

import pytest

from qcompiler.kernels.errors import ArtifactError
from qcompiler.kernels.formats.affine import BITS
from qcompiler.kernels.tuning.tables import (
    LinearConfig,
    heuristic,
    load_table,
    table_key,
    table_path,
    token_bucket,
)


def write(folder, entries, schema=1):
    path = table_path("NVIDIA Test-200", folder)
    path.write_text(json.dumps({"schema": schema, "gpu": "NVIDIA Test-200", "entries": entries}))
    return path


def test_an_entry_is_found_by_gpu_and_key(tmp_path):
    config = LinearConfig("gemm", 128, 16, 2, 4, 3)
    key = table_key(4, 64, 4096, 4096, 13, "bfloat16")
    assert key == "linear_affine/affine-b4-g64/n4096-k4096/m16/bfloat16"
    assert write(tmp_path, {key: config.to_json()}).name == "nvidia_test_200.json"
    assert load_table("NVIDIA Test-200", tmp_path) == {key: config}
    assert load_table("Another GPU", tmp_path) == {}


@pytest.mark.parametrize(
    "entry", [{"kind": "magic"}, {"kind": "gemm", "block_n": 0}, {"kind": "gemm", "block_q": 1}, {}, 3]
)
def test_a_damaged_table_is_refused(tmp_path, entry):
    write(tmp_path, {"key": entry})
    with pytest.raises(ArtifactError):
        load_table("NVIDIA Test-200", tmp_path)


def test_another_schema_is_refused(tmp_path):
    write(tmp_path, {}, schema=2)
    with pytest.raises(ArtifactError, match="schema 2"):
        load_table("NVIDIA Test-200", tmp_path)


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (2048, 2048)])
def test_tokens_share_power_of_two_buckets(tokens, bucket):
    assert token_bucket(tokens) == bucket


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 2, 8, 64, 256, 512, 4096])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_heuristic_respects_what_the_kernels_need(bits, tokens, dtype):
    for n, k in ((1, 1), (40, 64), (4096, 14336), (128256, 4096)):
        config = heuristic(bits, n, k, tokens, dtype, sms=132)
        if dtype == "float32":
            assert config.kind != "gemm"
        if config.kind == "gemm":
            assert config.block_m >= 16
        if config.kind == "gemv":
            assert config.block_m >= tokens
        assert config.split_k == 1 or k // config.split_k >= 1024
