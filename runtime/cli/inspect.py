"""qrun inspect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qcompiler.runtime.cli.options import artifact_argument, common, print_json


@click.command("inspect")
@artifact_argument
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common
def command(artifact: Path, tensors: bool, as_json: bool, verbose: bool) -> None:
    """What an artifact holds: architecture, formats, sizes, ops. Reads no weights."""
    from qcompiler.runtime.artifact import open_artifact

    opened = open_artifact(artifact, verify="sizes")
    facts = describe(opened, tensors=tensors)
    if as_json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    out = Console()
    table = Table(show_header=False, box=None)
    for key in (
        "kind",
        "model_type",
        "dtype",
        "vocab_size",
        "max_context",
        "bits_per_weight",
        "bytes",
        "manifest_sha256",
    ):
        table.add_row(key.replace("_", " "), str(facts[key]))
    out.print(table)
    layers = Table("format", "settings", "layers", "weights", title="Quantized layers")
    for entry in facts["formats"]:
        layers.add_row(entry["format"], entry["settings"], str(entry["layers"]), f"{entry['weights']:,}")
    out.print(layers)
    ops = Table("op", "nodes", title="Graph")
    for name, count in facts["ops"].items():
        ops.add_row(name, str(count))
    out.print(ops)
    for entry in facts.get("tensors", []):
        out.print(f"{entry['name']}  {entry['dtype']} {entry['shape']}", highlight=False)


def describe(artifact: Any, *, tensors: bool = False) -> dict[str, Any]:
    """The facts that `inspect` shows, as a JSON object."""
    from qcompiler.runtime.files import sha256_file
    from qcompiler.runtime.manifest import MANIFEST

    manifest = artifact.manifest
    formats: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for layer in manifest.layers:
        settings = ", ".join(f"{k} {v}" for k, v in sorted(layer.spec.items()) if k != "format")
        formats[layer.format, settings] += 1
        weights[layer.format, settings] += layer.out_features * layer.in_features
    entries = artifact.tensors.entries
    facts: dict[str, Any] = {
        "kind": manifest.kind,
        "model_type": manifest.model.model_type,
        "dtype": manifest.dtype,
        "vocab_size": manifest.model.vocab_size,
        "max_context": manifest.model.max_context,
        "bits_per_weight": manifest.raw.get("bits_per_weight"),
        "bytes": sum(f.size for f in manifest.files.values()),
        "manifest_sha256": sha256_file(artifact.root / MANIFEST),
        "formats": [
            {"format": f, "settings": s, "layers": n, "weights": weights[f, s]}
            for (f, s), n in formats.items()
        ],
        "ops": dict(Counter(node.op for node in artifact.graph.nodes).most_common()),
    }
    if tensors:
        facts["tensors"] = [
            {"name": n, "dtype": str(e.dtype).removeprefix("torch."), "shape": list(e.shape)}
            for n, e in sorted(entries.items())
        ]
    return facts
