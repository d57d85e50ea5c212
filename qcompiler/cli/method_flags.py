"""Flags that belong to one method: `--hqq-solver` for hqq, `--quant-type` for bnb, and so on.

A plug-in's options, which have no flag of their own, are given by `--option KEY=VALUE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from qcompiler.kernels.errors import InvalidInputError

# parameter name of the command -> (method, option of the method)
FLAGS = {
    "hqq_solver": ("hqq", "solver"),
    "tail_fraction": ("hqq", "tail_fraction"),
    "tail_bits": ("hqq", "tail_bits"),
    "quant_type": ("bnb", "quant_type"),
    "double_quant": ("bnb", "double_quant"),
    "outlier_threshold": ("bnb", "outlier_threshold"),
    "scheme": ("aqlm", "scheme"),
    "beam": ("aqlm", "beam"),
    "aqlm_code_updates": ("aqlm", "code_updates"),
}

_SOLVERS = click.Choice(["search", "reference"])
_TABLES = click.Choice(["nf4", "fp4"])

_DECORATORS = (
    click.option("--hqq-solver", type=_SOLVERS, help="hqq: ours (search), or the published one."),
    click.option(
        "--tail-fraction",
        metavar="F|auto",
        help="hqq: part of the weights kept beside the body, log-coded [0].",
    ),
    click.option("--tail-bits", type=int, help="hqq: bits of such a weight [8]."),
    click.option("--quant-type", type=_TABLES, help="bnb, 4 bits: table of values [nf4]."),
    click.option(
        "--double-quant/--no-double-quant", default=None, help="bnb, 4 bits: absmax in 8 bits [on]."
    ),
    click.option("--outlier-threshold", type=float, help="bnb, 8 bits: larger activations stay half [6]."),
    click.option("--scheme", metavar="MxB", help="aqlm: codebooks x bits per code, e.g. 1x16 [8-bit codes]."),
    click.option("--beam", type=int, help="aqlm: partial sums kept in the search of codes."),
    click.option("--aqlm-code-updates", type=int, help="aqlm: how often fine-tuning chooses codes anew."),
    click.option("--option", "extra", multiple=True, metavar="KEY=VALUE", help="Any option of the method."),
)


def method_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of all methods to a click command."""
    for decorator in reversed(_DECORATORS):
        command = decorator(command)
    return command


def collect(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Take the method flags out of `given` and return the method's options.

    Raises:
        InvalidInputError: A flag of another method, or `--option` without `=`.
    """
    options: dict[str, Any] = {}
    for flag, (owner, key) in FLAGS.items():
        value = given.pop(flag)
        if value is None:
            continue
        if owner != method:
            name = "--" + flag.replace("_", "-")
            raise InvalidInputError(
                f"{name} belongs to --method {owner}, not {method}", hint="Drop one of them."
            )
        options[key] = value
    extra: tuple[str, ...] = given.pop("extra")
    for item in extra:
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidInputError(f"--option {item!r} has no value", hint="Write --option KEY=VALUE.")
        options[key] = value
    return options


def typed(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the text of `--option` values into the types of the options' defaults.

    Args:
        options: Values, texts where they came from `--option`.
        defaults: Option name → default value; unknown names pass through and are refused by the method.

    Raises:
        InvalidInputError: A text that is not of the type.
    """
    result: dict[str, Any] = {}
    for key, value in options.items():
        default = defaults.get(key)
        if isinstance(value, str) and default is not None and not isinstance(default, str):
            value = _parse(key, value, type(default))
        result[key] = float(value) if isinstance(default, float) and isinstance(value, int) else value
    return result


def _parse(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise InvalidInputError(f"option {key}={text!r} is not a {kind.__name__}")
