"""The tables and plots of docs/quality.md and docs/speed.md, made from benchmarks/results/*.json alone.

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

from benchmarks.plots import Plot, is_current, plots_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
MODELS = ("tiny-llama", "small-llama")
IMAGES = ROOT / "docs/images"
NOT_MEASURED = "Not measured yet."
_VERSIONS = ("driver", "torch", "triton")


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def facts(machine: dict[str, Any]) -> str:
    """One sentence on what was measured on, and its ceilings in the same run."""
    parts = [machine["gpu"], *(f"{name} {machine[name]}" for name in _VERSIONS if name in machine)]
    for name, unit in (("copy", "TB/s"), ("bf16", "TFLOP/s")):
        key = f"{name}_{unit.lower().replace('/s', '_per_second')}"
        if key in machine:
            parts.append(f"{name} {machine[key]:.{2 if unit == 'TB/s' else 0}f} {unit}")
    reads = machine.get("read_tb_per_second", {})
    if reads:
        parts.append("read " + ", ".join(f"{tb:.2f} TB/s of {mb} MB" for mb, tb in reads.items()))
    return ", ".join(parts) + f". Made by `{machine['command']}`."


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
            number(r["read_ceiling_us"] / r["us"] if "read_ceiling_us" in r else None, 2),
            number(r["bf16_us"]),
            *(number(r.get(peer)) for peer in peers),
        ]
        for r in result["rows"]
    ]
    return f"{facts(result['machine'])}\n\n{markdown(head, rows)}"


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

    parts = [f"{facts(result['machine'])} {result['dtype']}."]
    for kind, unit, label in (("prefill", "_tflops", "TFLOP/s"), ("decode", "_us", "µs")):
        rows = result[kind]
        if not rows:
            parts.append(f"{kind.capitalize()} was not measured.")
            continue
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
    """Whole models: first token, prefill and memory, then decoded tokens per second by batch."""
    from benchmarks.plots import row_shape

    parts = [facts(run) for run in result["runs"]]
    for shape in dict.fromkeys(row_shape(row) for row in result["rows"]):
        rows = [row for row in result["rows"] if row_shape(row) == shape and "failed" not in row]
        batches = sorted({int(b) for row in rows for b in row["decode"]})
        prompts = sorted({int(t) for row in rows for t in row["prefill"]})
        head = [
            shape, "after", *(f"{b} seq., tok/s" for b in batches), *(f"first of {t}, ms" for t in prompts),
            *(f"prefill {t}, tok/s" for t in prompts), "peak, GB",
        ]  # fmt: skip
        body = []
        for row in sorted(rows, key=lambda row: row["peer"]):
            note = f" ({row['note']})" if row.get("note") else ""
            decode = [row["decode"].get(str(b), {}).get("tokens_per_second") for b in batches]
            first = [row["prefill"].get(str(t), {}) for t in prompts]
            milliseconds = [1e3 * f["seconds"] if f else None for f in first]
            body.append([
                row["label"] + note, row["decode_prompt"], *(number(d, 0) for d in decode),
                *(number(m) for m in milliseconds),
                *(number(f.get("tokens_per_second"), 0) for f in first), number(row.get("peak_gb"), 1),
            ])  # fmt: skip
        parts.append(markdown(head, body))
        failed = [row for row in result["rows"] if row_shape(row) == shape and "failed" in row]
        parts += [f"{row['label']}: {row['failed']}" for row in failed]
    return "\n\n".join(parts)


def compile_speed(result: dict[str, Any]) -> str:
    """The solver beside the package, and whole compilations."""
    parts = [facts(result["machine"])]
    if "solver" in result:
        rows = [
            [f"ours, {r['bits']} bit, {r['rounds']} rounds", number(r["weights"] / 1e9, 2),
             number(r["seconds"], 3), number(r["weights"] / r["seconds"] / 1e9, 2)]
            for r in result["solver"]
        ]  # fmt: skip
        package = result["package"]
        if "seconds" in package:
            rows.append([
                f"hqq package, {package['bits']} bit", number(package["weights"] / 1e9, 2),
                number(package["seconds"], 3), number(package["weights"] / package["seconds"] / 1e9, 2),
            ])  # fmt: skip
        parts.append(markdown(["solver", "G weights", "time, s", "G weights/s"], rows))
        if "times_faster_than_package" in result:
            parts.append(
                f"By the weight, {result['times_faster_than_package']:.0f} times the package's speed."
            )
    head = ["model", "qcompile", "source, GB", "time, s", "GB/s of source", "peak memory, GB", "bound, GB"]
    rows = [
        [
            r["model"], f"`{r['arguments']}`", number(_giga(r.get("source_bytes"))),
            number(r["process_seconds"]), number(_giga(r.get("source_bytes_per_second")), 2),
            number(r["peak_rss_bytes"] / 1e9, 2), number(r["memory_bound_bytes"] / 1e9, 2),
        ]
        for r in result["compilations"]
    ]  # fmt: skip
    return "\n\n".join([*parts, *([markdown(head, rows)] if rows else [])])


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def backend(result: dict[str, Any]) -> str:
    """Milliseconds of one step by number of tokens."""
    tokens = list(dict.fromkeys(t for r in result["results"].values() for t in r.get("ms", {})))
    body = [
        [name, *(number(r.get("ms", {}).get(t), 2) for t in tokens), number(r.get("relative_error"), 4)]
        for name, r in result["results"].items()
    ]
    table = markdown(["", *(f"{t} tokens, ms" for t in tokens), "relative error of logits"], body)
    breaks = sum(result["graph_breaks"].values())
    setting = f"{result['shape']}, {result['layers']} layers, {result['method']}, {result['bits']} bit"
    return f"{facts(result['machine'])} {setting}; {breaks} graph breaks.\n\n{table}"


def aqlm_block(result: dict[str, Any]) -> str:
    """Seconds of each phase of one block."""
    phases = result["measured"]["phases"]
    table = markdown(
        ["phase", "measured, s", "predicted, s"],
        [[name, number(s), number(result["predicted"].get(name))] for name, s in phases.items()],
    )
    of, shared = result["settings"], result.get("shared", "")
    return (
        f"{facts(result['machine'])} {of['scheme']}, {of['tokens']} tokens, hidden size {of['hidden']}; "
        f"with its streams {result['seconds_with_streams']:.0f} s a block. {shared}\n\n{table}"
    )


def serve(result: dict[str, Any]) -> str:
    """The server beside the bare engine, and the time between tokens."""
    throughput = markdown(
        ["streams", "engine, tokens/s", "server, tokens/s", "ratio", "busiest client"],
        [
            [
                r["streams"],
                number(r["engine_decode"], 0),
                number(r["server_decode"], 0),
                number(r["decode_ratio"], 3),
                number(max(run["client_busy"] for run in r["server"]), 2),
            ]
            for r in result["throughput"]
        ],
    )
    of = result["settings"]
    head = (
        f"{result['model']}. {facts(result['machine'])} "
        f"Prompts of {of['prompt_tokens']} tokens, {of['decode_tokens']} generated.\n\n{throughput}"
    )
    if not result["latency"]:
        return f"{head}\n\n{result['cut']}"
    gaps = markdown(
        ["prompts", "p50 quiet, ms", "p99 quiet", "p50 loaded", "p99 loaded", "p99 ratio"],
        [
            [{"chunked": "in pieces", "unchunked": "whole"}.get(name, name)]
            + [number(rows[kind][q]) for kind in ("quiet", "loaded") for q in ("p50_ms", "p99_ms")]
            + [number(rows["p99_ratio"], 2)]
            for name, rows in result["latency"].items()
        ],
    )
    return (
        f"{head}\n\n"
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


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "linear": linear, "attention": attention, "model": model, "compile-speed": compile_speed, "serve": serve,
    "backend": backend, "aqlm-block": aqlm_block,
}  # fmt: skip


def results_of(kind: str) -> dict[str, dict[str, Any]]:
    """Files of a benchmark by stem; there may be several, as in `serve.json` and `serve-other.json`."""
    files = [p for p in sorted(RESULTS.glob(f"{kind}*.json")) if re.fullmatch(rf"{kind}(-.+)?", p.stem)]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def speed_plots() -> list[Plot]:
    """Plots of docs/speed.md."""
    return [
        plot
        for kind in KINDS
        for stem, found in results_of(kind).items()
        for plot in plots_of(kind, stem, found)
    ]


def speed_tables() -> dict[str, str]:
    """Tables of docs/speed.md, with its plots below them."""
    made = {}
    for kind, table in KINDS.items():
        parts = []
        for stem, found in results_of(kind).items():
            parts.append(table(found))
            parts += [f"![{plot.title}](images/{plot.name}.svg)" for plot in plots_of(kind, stem, found)]
        made[kind] = "\n\n".join(parts) or NOT_MEASURED
    return made


def stale(*, write: bool = False) -> list[str]:
    """Tables and plots that are not what the results say; with `write` they are written."""
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
    for plot in speed_plots():
        if not is_current(plot, IMAGES):
            found.append(f"docs/images/{plot.name}.svg")
            if write:
                plot.draw(IMAGES / f"{plot.name}.svg")
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
