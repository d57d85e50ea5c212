"""The server's benchmark runs and measures what it says, at a tiny scale."""

from __future__ import annotations

import json
import sys

import pytest


def test_the_benchmark_writes_its_figures(tiny_q4, tmp_path, monkeypatch):
    from benchmarks import serve

    output = tmp_path / "serve.json"
    arguments = (
        "--device cpu --streams 2 4 --prompt-tokens 16 --decode-tokens 24 --repeats 1 --processes 2 "
        "--latency-streams 2 --latency-tokens 200 --settle 0.1 --seconds 0.5 --long-prompt 200 --rate 5"
    )
    monkeypatch.setattr(sys, "argv", ["serve", str(tiny_q4), *arguments.split(), "--output", str(output)])
    serve.main()
    result = json.loads(output.read_text())
    assert [row["streams"] for row in result["throughput"]] == [2, 4]
    for row in result["throughput"]:
        assert row["decode_ratio"] == pytest.approx(row["server"][0]["decode"] / row["engine_decode"])
        assert row["server"][0]["whole"] > 0
    for rows in result["latency"].values():
        assert rows["loaded"]["long_prompts"] >= 1
        assert 0 < rows["quiet"]["p50_ms"] <= rows["quiet"]["p99_ms"] <= rows["quiet"]["max_ms"]
        assert rows["p99_ratio"] == pytest.approx(rows["loaded"]["p99_ms"] / rows["quiet"]["p99_ms"])


def test_gaps_are_those_of_the_window():
    from benchmarks.serve import gaps

    streams = [[0.0, 1.0, 1.5, 4.0], [1.0, 3.0]]
    assert gaps(streams, 1.0, 3.5).tolist() == [0.5, 2.0]
