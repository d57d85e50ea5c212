"""The tables of docs/quality.md and docs/speed.md, made from benchmarks/results/*.json and from nothing else.

    python -m benchmarks.tables           writes what is not current
    python -m benchmarks.tables --check   only says so, and exits with 1

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Where no result file is there yet, the
page says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MODELS = ("tiny-llama", "small-llama")
NOT_MEASURED = "Not measured yet."


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def linear(result: dict[str, Any]) -> str:
    """Microseconds of linear layers."""
    known = {"us", "bf16_us", "read_ceiling_us"}
    peers = sorted({key for r in result["rows"] for key in r if key.endswith("_us") and key not in known})
    names = [peer.removesuffix("_us").replace("_", " ") for peer in peers]
    head = [
        "format",
        "out x in",
        "tokens",
        "ours, µs",
        "over bf16",
        "of read ceiling",
        "bf16 cuBLAS, µs",
        *names,
    ]
    rows = [
        [
            r["case"],
            f"{r['n']}x{r['k']}",
            r["tokens"],
            number(r["us"]),
            number(r["bf16_us"] / r["us"], 2),
            number(r["read_ceiling_us"] / r["us"], 2),
            number(r["bf16_us"]),
            *(number(r.get(peer)) for peer in peers),
        ]
        for r in result["rows"]
    ]
    of = result["machine"]
    facts = f"{of['gpu']}, torch {of['torch']}, triton {of['triton']}"
    rates = f"copy {of['copy_tb_per_second']:.2f} TB/s, bf16 {of['bf16_tflop_per_second']:.0f} TFLOP/s"
    return f"{facts}, {rates}.\n\n{markdown(head, rows)}"


def attention(result: dict[str, Any]) -> str:
    """Prefill in TFLOP/s and decode in microseconds."""
    shape = "sequences x tokens, heads, KV heads, size"

    def case(row: dict[str, Any]) -> str:
        sequences, tokens, heads, kv_heads, size = row["case"]
        return f"{sequences}x{tokens}, {heads}, {kv_heads}, {size}"

    def columns(rows: list[dict[str, Any]], unit: str) -> list[str]:
        return sorted(
            {key for r in rows for key in r if key.endswith(unit) and not key.startswith(("ours", "ceil"))}
        )

    parts = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['dtype']}."]
    for kind, unit, label in (("prefill", "_tflops", "TFLOP/s"), ("decode", "_us", "µs")):
        rows = result[kind]
        peers = columns(rows, unit)
        names = [p.removesuffix(unit) for p in peers]
        last = ["read ceiling"] if kind == "decode" else []
        body = [
            [case(r), number(r.get(f"ours{unit}")), *(number(r.get(p)) for p in peers)]
            + ([number(r.get("ceiling_us"))] if kind == "decode" else [])
            for r in rows
        ]
        parts.append(f"{kind.capitalize()}, {label}:")
        parts.append(markdown([shape, "ours", *names, *last], body))
    return "\n\n".join(parts)


def model(result: dict[str, Any]) -> str:
    """Whole models: compile time and memory, then tokens per second by batch."""
    compiled = markdown(
        ["qcompile", "time, s", "peak memory, GB", "bits per weight, linears"],
        [
            [
                f"`{v['arguments']}`",
                number(v["compile"]["process_seconds"]),
                number(v["compile"]["peak_rss_bytes"] / 1e9, 2),
                number(v["compile"].get("bits_per_weight_linears"), 3),
            ]
            for v in result["variants"]
        ],
    )
    speed = markdown(
        ["qcompile", "batch", "prompt tokens", "prefill, tokens/s", "decode, tokens/s"],
        [
            [
                f"`{v['arguments']}`",
                r["batch"],
                r["prompt_tokens"],
                number(r["prefill_tokens_per_second"], 0),
                number(r["decode_tokens_per_second"], 0),
            ]
            for v in result["variants"]
            for r in v["bench"]["rows"]
        ],
    )
    return f"{result['shape']}, {result['device']}, torch {result['torch']}.\n\n{compiled}\n\n{speed}"


def serve(result: dict[str, Any]) -> str:
    """The server beside the bare engine, and the time between tokens."""
    throughput = markdown(
        ["streams", "engine, tokens/s", "server, tokens/s", "ratio"],
        [
            [
                r["streams"],
                number(r["engine_decode"], 0),
                number(max(run["decode"] for run in r["server"]), 0),
                number(r["decode_ratio"], 3),
            ]
            for r in result["throughput"]
        ],
    )
    gaps = markdown(
        ["prompts", "p50 quiet, ms", "p99 quiet", "p50 loaded", "p99 loaded", "p99 ratio"],
        [
            [{"chunked": "in pieces", "unchunked": "whole"}.get(name, name)]
            + [number(rows[kind][q]) for kind in ("quiet", "loaded") for q in ("p50_ms", "p99_ms")]
            + [number(rows["p99_ratio"], 2)]
            for name, rows in result["latency"].items()
        ],
    )
    of = result["settings"]
    return (
        f"{result['model']}, {result['device']}, torch {result['torch']}. "
        f"Prompts of {of['prompt_tokens']} tokens, {of['decode_tokens']} generated.\n\n{throughput}\n\n"
        f"Time between the tokens of {of['latency_streams']} streams, quiet and while {of['rate']:g} prompts "
        f"of {of['long_prompt']} tokens a second arrive:\n\n{gaps}"
    )


def quality_tables() -> dict[str, str]:
    """Tables of docs/quality.md, by the benchmarks that measure them."""
    from benchmarks import methods, quality

    results = [json.loads((RESULTS / f"quality-{m}.json").read_text(encoding="utf-8")) for m in MODELS]
    made = {m: quality.table(r) for m, r in zip(MODELS, results, strict=True)}
    made["ratios"] = quality.ratios(results)
    for name in MODELS:
        rows = json.loads((RESULTS / f"methods-{name}.json").read_text(encoding="utf-8"))["rows"]
        made[f"methods-{name}"] = methods.table(rows)
    return made


def speed_tables() -> dict[str, str]:
    """Tables of docs/speed.md; of a kind there may be several, as in `serve.json` and `serve-other.json`."""
    kinds: dict[str, Callable[[dict[str, Any]], str]] = {
        "linear": linear, "attention": attention, "model": model, "serve": serve,
    }  # fmt: skip
    made = {}
    for kind, table in kinds.items():
        files = [p for p in sorted(RESULTS.glob(f"{kind}*.json")) if re.fullmatch(rf"{kind}(-.+)?", p.stem)]
        parts = [table(json.loads(p.read_text(encoding="utf-8"))) for p in files]
        made[kind] = "\n\n".join(parts) or NOT_MEASURED
    return made


def stale(*, write: bool = False) -> list[str]:
    """Tables that are not what the results say; with `write` they are written."""
    found = []
    for page, tables in (("quality.md", quality_tables()), ("speed.md", speed_tables())):
        path = ROOT / "docs" / page
        text = before = path.read_text(encoding="utf-8")
        for name, body in tables.items():
            begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
            if text.count(begin) != 1 or text.count(end) != 1:
                raise ValueError(f"docs/{page} has no place for the table {name}")
            head, rest = text.split(begin)
            old, tail = rest.split(end, 1)
            if old != body:
                found.append(f"docs/{page}: {name}")
                text = head + begin + body + end + tail
        if write and text != before:
            path.write_text(text, encoding="utf-8")
    return found


def main() -> int:
    """Write, or check."""
    check = "--check" in sys.argv[1:]
    found = stale(write=not check)
    for name in found:
        print(("not current: " if check else "wrote ") + name)
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
