"""qrun: generate, chat, serve, eval, bench, tune, inspect and verify an artifact.

Results go to stdout, everything else to stderr; with --json stdout holds one
JSON object and nothing else. Exit codes: 0 fine, 2 refused input, 3 quality
gate, 1 our fault.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

# command -> (module, function); imported when used, so that --help needs neither torch nor rich.
_COMMANDS = {
    "generate": ("qcompiler.runtime.cli.generate", "Continue one or more prompts."),
    "chat": ("qcompiler.runtime.cli.chat", "Talk with the model by its chat template."),
    "serve": ("qcompiler.runtime.cli.serve", "Answer requests by OpenAI's HTTP API."),
    "eval": ("qcompiler.runtime.cli.eval", "Perplexity of a text file."),
    "bench": ("qcompiler.runtime.cli.bench", "Prefill and decode speed by batch size."),
    "tune": ("qcompiler.runtime.cli.tune", "Measure kernel configurations on this GPU."),
    "inspect": ("qcompiler.runtime.cli.inspect", "What an artifact holds."),
    "verify": ("qcompiler.runtime.cli.verify", "Check every byte of an artifact."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(_COMMANDS[cmd_name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qcompiler", prog_name="qrun")
def cli() -> None:
    """Run an artifact that qcompile wrote."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `qrun`; exits with the code that the outcome stands for."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run a command line and return its exit code."""
    verbose = "-v" in argv or "--verbose" in argv
    try:
        result: Any = cli.main(args=argv, prog_name="qrun", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of stdout went away; what is left in the buffer has nowhere to go.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0
    except Exception as e:
        return _report(e, verbose=verbose)


def _report(error: Exception, *, verbose: bool) -> int:
    from qcompiler.kernels.errors import QCompilerError

    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, QCompilerError):
        click.echo(f"qrun: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        return error.exit_code
    text = str(error).splitlines()[0] if str(error) else ""
    click.echo(f"qrun: {type(error).__name__}: {text}", err=True)
    if not verbose:
        click.echo("  This is a fault of qrun; -v shows where.", err=True)
    return 1


if __name__ == "__main__":
    main()
