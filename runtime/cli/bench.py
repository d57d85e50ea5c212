"""qrun bench."""

from __future__ import annotations

from pathlib import Path

import click

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.cli.options import artifact_argument, common, console, device, load_model, print_json


@click.command("bench")
@artifact_argument
@click.option(
    "--batch", "batches", default="1,4,16", show_default=True, help="Numbers of sequences, by commas."
)
@click.option("--prompt-tokens", type=int, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--decode-tokens", type=int, default=32, show_default=True, help="Tokens generated for each.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of which the median is given.")
@device
@common
def command(
    artifact: Path,
    batches: str,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    device: str | None,
    lean: bool,
    kv_bits: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Prefill and decode speed by batch size.

    With --json: device, dtype, cold_start (seconds from the start of the process until the model could
    answer, and those of each phase) and results, a list of batch, prompt_tokens, decode_tokens,
    prefill_tokens_per_second and decode_tokens_per_second.
    """
    from qcompiler.runtime.bench import bench

    try:
        sizes = tuple(int(b) for b in batches.split(","))
    except ValueError:
        raise InvalidInputError(
            f"--batch {batches!r} is not a list of numbers", hint="For example 1,4,16."
        ) from None
    if not all(1 <= b <= 1024 for b in sizes):
        raise InvalidInputError("--batch: sizes must be in [1, 1024]")
    model = load_model(
        artifact, device, verbose=verbose, lean=lean, kv_bits=kv_bits, max_sequences=max(sizes), warm_up=sizes
    )
    with console().status("warming up") as status:
        rows = bench(
            model,
            batches=sizes,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            repeats=repeats,
            progress=status.update,
        )
    if as_json:
        print_json(
            {
                "device": _device_name(model.device),
                "dtype": model.artifact.manifest.dtype,
                "cold_start": model.cold_start.to_json(),
                "results": [row.to_json() for row in rows],
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "prefill tok/s", "decode tok/s", title=_device_name(model.device))
    for row in rows:
        table.add_row(
            str(row.batch), f"{row.prefill_tokens_per_second:.1f}", f"{row.decode_tokens_per_second:.1f}"
        )
    Console().print(table)


def _device_name(device: object) -> str:
    import torch

    return torch.cuda.get_device_name(device) if getattr(device, "type", "") == "cuda" else "cpu"  # type: ignore[arg-type]
