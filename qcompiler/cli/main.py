"""`qcompile MODEL --method M --bits B`: the compiler's command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompiler import __version__
from qcompiler.cli.config_file import apply_config
from qcompiler.cli.method_flags import collect, method_flags, typed
from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.kernels.kv_bits import KV_BITS
from qcompiler.options import DTYPES, SENSITIVITIES, CompileOptions, parse_bits, parse_size

if TYPE_CHECKING:
    from rich.console import Console

# What `qcompiler[compile]` brings and a runtime-only installation lacks.
_COMPILE_EXTRAS = frozenset({"transformers", "psutil", "packaging", "huggingface_hub"})

EPILOG = """\b
Examples:
  qcompile examples/models/tiny-llama --method hqq --bits 4
  qcompile owner/name --bits 3 --bits '*.o_proj=6' --lm-head-bits 8 -o out
  qcompile owner/name --bits 4 --dry-run
  qcompile owner/name --target-bpw 3.0 --report-plot curve.png
  qcompile owner/name --bits 4 --emit artifact,onnx
  qcompile emit ARTIFACT --to onnx         (see qcompile emit --help)
\b
Exit codes: 0 done, 2 refused input, 3 quality gate missed, 1 our fault.
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.argument("model")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=apply_config,
    help="YAML file with these options, or with LLaMA-Factory's keys; flags override it.",
)
@click.option(
    "-m", "--method", help="hqq, rtn, bnb, eetq, gptq, aqlm, none [hqq]; auto with a target [auto]."
)
@click.option(
    "-b", "--bits", "bits", multiple=True, metavar="B|PATTERN=B",
    help="Bits per weight [4, or the method's first]; PATTERN=B for some linears; the last match wins.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Artifact folder [<model>-<method>-<bits>bit]."
)
@click.option(
    "-g", "--group-size", type=int, help="Weights per scale: 16, 32, 64, 128, 256; 0 = per output channel."
)
@click.option(
    "--target-bpw", type=float, help="Choose a format for each linear: bits per weight of them all."
)
@click.option("--target-size", metavar="SIZE", help="The same for the artifact's size: 5GB, 4.5GiB, 800MB.")
@click.option("--target-kl", type=float, help="The same: the smallest size with this measured KL divergence.")
@click.option(
    "--sensitivity",
    default="output",
    show_default=True,
    type=click.Choice(SENSITIVITIES),
    help="How a target weighs its choices: output, on calibration text; weights, without.",
)
@click.option(
    "--report-plot", type=click.Path(path_type=Path), help="Draw a target's trade-off of size and loss here."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", default="auto", show_default=True, type=click.Choice(DTYPES), help="Activation dtype."
)
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these linears alone; repeatable.")
@click.option("--lm-head-bits", type=int, help="Quantize the output head too, at this width.")
@click.option(
    "--embedding-bits", type=int, help="Quantize token embeddings too: 8 or 4; a tied head shares the table."
)
@click.option(
    "--kv-bits", default="16", show_default=True, type=click.Choice(list(KV_BITS)), help="Of the KV cache."
)
@method_flags
@click.option(
    "--eval-text", type=click.Path(path_type=Path), help="Text for the quality figures [one that ships]."
)
@click.option(
    "--eval-tokens", type=int, default=4096, show_default=True, help="Tokens of it; 0 = do not measure."
)
@click.option("--eval-context", type=int, default=512, show_default=True, help="Window length in tokens.")
@click.option(
    "--calib-text", type=click.Path(path_type=Path), help="Text for gptq and aqlm [one that ships]."
)
@click.option("--calib-tokens", type=int, default=65536, show_default=True, help="Tokens of it to use.")
@click.option(
    "--max-kl", type=float, help="Fail (exit 3), keeping nothing, when the mean KL divergence is larger."
)
@click.option(
    "--emit",
    default="artifact",
    show_default=True,
    metavar="LIST",
    help="artifact, onnx, pt2 (torch.export), aoti (AOTInductor); comma between.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print sizes, memory and time needed; read no weights, write nothing."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact; start an unfinished one anew.")
@click.option("--resume", is_flag=True, help="Continue an unfinished compilation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
@click.option(
    "--fuse/--no-fuse",
    default=True,
    show_default=True,
    help="Join ops of the graph into fewer launches.",
)
@click.option(
    "--dump-graphs", type=click.Path(path_type=Path), metavar="DIR", help="Write every pass's graphs."
)
@click.option(
    "--max-context", type=int, help="Longest context, for models whose rotary frequencies depend on it."
)
@click.option("--revision", help="Hub revision.")
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run code from the checkpoint.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
@click.option("-v", "--verbose", is_flag=True, help="Every layer and pass; tracebacks.")
@click.version_option(__version__)
def qcompile(
    model: str, method: str | None, bits: tuple[str, ...], target_size: str | None, emit: str, dry_run: bool,
    as_json: bool, quiet: bool, verbose: bool, **flags: Any,
) -> None:  # fmt: skip
    """Compile MODEL (a checkpoint folder, or a hub id) into a quantized artifact."""
    from rich.console import Console

    stderr = Console(stderr=True, quiet=quiet)
    default, overrides = parse_bits(bits)
    targets = (flags["target_bpw"], target_size, flags["target_kl"])
    has_target = any(target is not None for target in targets)
    if has_target and default is not None:
        raise InvalidInputError(
            f"--bits {default} and a target contradict each other",
            hint="Fix some linears only (--bits 'PATTERN=8'), or drop one of the two.",
        )
    method = method or ("auto" if has_target else "hqq")
    method_options = collect(method, flags)
    # Heavy imports come after the command line was found to make sense.
    from qcompiler.emit.targets import parse_targets
    from qcompiler.methods.base import get_method
    from qcompiler.progress import ConsoleProgress, Progress

    chosen = get_method(method)
    options = CompileOptions(
        model=model,
        method=method,
        bits=chosen.default_bits if default is None else default,
        bits_overrides=overrides,
        emit=parse_targets(emit),
        method_options=typed(method_options, {key: o.default for key, o in chosen.options.items()}),
        target_bytes=None if target_size is None else parse_size(target_size),
        **flags,
    )

    progress = Progress() if quiet else ConsoleProgress(stderr, verbose=verbose)
    stdout = Console(quiet=quiet or as_json)
    if dry_run:
        from qcompiler.estimate import dry_run as estimate

        result: Any = estimate(options, progress)
    else:
        from qcompiler.pipeline import compile_model

        result = compile_model(options, progress)
    result.print(stdout)
    if as_json:
        print(json.dumps(result.to_json()))


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs the command and turns errors into exit codes.

    `qcompile emit ...` is a command of its own; anything else compiles (a folder called emit is `./emit`).
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["emit"]:
        from qcompiler.cli.emit import emit

        sys.exit(run(emit, arguments[1:]))
    sys.exit(run(qcompile, arguments))


def run(command: click.Command, argv: list[str] | None = None) -> int:
    """Run a click command; every outcome is an exit code, and every error a short text on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        command.main(args=arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted", "Rerun with --resume to continue; nothing half-written was left in place.")
        return 130
    except QCompilerError as error:
        if verbose:
            _traceback()
        _say(error.message, error.hint)
        return error.exit_code
    except Exception as error:
        if verbose:
            _traceback()
        if isinstance(error, ModuleNotFoundError) and error.name in _COMPILE_EXTRAS:
            _say(f"compiling needs the package {error.name}", 'Install it: pip install "qcompiler[compile]"')
            return 2
        _say(
            f"internal error: {type(error).__name__}: {error}",
            "This is our fault. Rerun with -v for the traceback and report it.",
        )
        return 1
    return 0


def _say(message: str, hint: str | None) -> None:
    from rich.markup import escape

    console = _stderr()
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if hint:
        console.print(escape(hint), highlight=False, soft_wrap=True)


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


if __name__ == "__main__":
    main()
