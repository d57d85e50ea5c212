"""`qcompile emit ARTIFACT --to onnx`: an artifact in another runtime's files."""

from __future__ import annotations

import json
from pathlib import Path

import click

EPILOG = """\b
Examples:
  qcompile emit tiny-llama-hqq-4bit --to onnx
  qcompile emit tiny-llama-hqq-4bit --to onnx --accuracy-level 4 -o fast
"""


@click.command("qcompile emit", context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Choice(["onnx"]), help="What to emit.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder [<artifact>-onnx].")
@click.option("--overwrite", is_flag=True, help="Replace an emission that is there.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float16"]),
    help="Activations.",
)
@click.option(
    "--zeros",
    default="integer",
    show_default=True,
    type=click.Choice(["integer", "float"]),
    help="Affine zero points: integer (solved again where they are not), or as they are (slow on a CPU).",
)
@click.option(
    "--accuracy-level",
    default="0",
    show_default=True,
    type=click.Choice(["0", "4"]),
    help="MatMulNBits: 0 computes with activations as they are, 4 rounds them to int8 (faster).",
)
@click.option(
    "--attention",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "plain"]),
    help="GroupQueryAttention where it can say the model (auto), or basic operators (plain).",
)
@click.option(
    "--eval-tokens",
    default=4096,
    show_default=True,
    help="Tokens of text to compare solved zero points on; 0 = do not.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks.")
def emit(
    artifact: Path,
    target: str,
    output: Path | None,
    overwrite: bool,
    dtype: str,
    zeros: str,
    accuracy_level: str,
    attention: str,
    eval_tokens: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Emit ARTIFACT (a folder that qcompile wrote) for another runtime."""
    from rich.console import Console

    from qcompiler.emit.onnx.emit import OnnxOptions, emit_onnx
    from qcompiler.progress import ConsoleProgress, Progress
    from qcompiler.runtime.artifact import open_artifact

    options = OnnxOptions(
        dtype=dtype,
        zeros=zeros,
        accuracy_level=int(accuracy_level),
        attention=attention,
        eval_tokens=eval_tokens,
    )
    progress = Progress() if quiet else ConsoleProgress(Console(stderr=True), verbose=verbose)
    folder = output or artifact.with_name(f"{artifact.resolve().name}-{target}")
    report = emit_onnx(open_artifact(artifact), folder, options, overwrite=overwrite, progress=progress)
    report.print(Console(quiet=quiet or as_json))
    if as_json:
        print(json.dumps(report.to_json()))
