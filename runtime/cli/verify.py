"""qrun verify."""

from __future__ import annotations

from pathlib import Path

import click

from qcompiler.runtime.cli.options import artifact_argument, common, print_json


@click.command("verify")
@artifact_argument
@common
def command(artifact: Path, as_json: bool, verbose: bool) -> None:
    """Check every byte of an artifact: digests, structure, formats, ops, and that no weight is NaN or Inf.

    With --json: ok, files, tensors, bytes, manifest_sha256.
    """
    from qcompiler.runtime.artifact import check_contents, open_artifact
    from qcompiler.runtime.files import sha256_file
    from qcompiler.runtime.manifest import MANIFEST

    opened = open_artifact(artifact, verify="full")
    count = sum(1 for _ in check_contents(opened))
    manifest = opened.manifest
    facts = {
        "ok": True,
        "files": len(manifest.files) + 1,
        "tensors": count,
        "bytes": sum(f.size for f in manifest.files.values()),
        "manifest_sha256": sha256_file(opened.root / MANIFEST),
    }
    if as_json:
        print_json(facts)
    else:
        click.echo(
            f"{artifact}: {facts['files']} files, {count} tensors, {facts['bytes']} bytes: as they were made"
        )
        click.echo(f"manifest sha256 {facts['manifest_sha256']}")
