"""`qcompile --config FILE`: options from YAML, ours or under the keys of LLaMA-Factory; flags override."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from qcompiler.kernels.errors import InvalidInputError

# Keys of LLaMA-Factory's configuration → ours.
_FOREIGN = {
    "model_name_or_path": "model",
    "quantization_bit": "bits",
    "quantization_method": "method",
    "quantization_type": "quant_type",
    "double_quantization": "double_quant",
}
_METHODS = {"bitsandbytes": "bnb"}


def apply_config(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Click callback: make the file's values the defaults of the command's parameters.

    Raises:
        InvalidInputError: The file is missing, no YAML mapping, or has a key that means nothing.
    """
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_config(path, parameter_names(context))}
    return path


def parameter_names(context: click.Context) -> set[str]:
    """What may stand in a file: the command's own parameters, less the file itself."""
    return {str(p.name) for p in context.command.params} - {"config", "version", "help"}


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: The YAML file.
        known: Parameter names of the command.

    Returns:
        Values by parameter name.

    Raises:
        InvalidInputError: See `apply_config`.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InvalidInputError(f"{path} is not a mapping of options", hint="Write lines like `bits: 4`.")
    return dict(_entry(path, str(key), value, known) for key, value in data.items())


def _entry(path: Path, key: str, value: Any, known: set[str]) -> tuple[str, Any]:
    name = _FOREIGN.get(key, key.replace("-", "_"))
    if name not in known:
        near = get_close_matches(key, [*_FOREIGN, *known], n=1, cutoff=0.4)
        raise InvalidInputError(
            f"{path}: there is no option {key!r}", hint=f"Did you mean {near[0]}?" if near else None
        )
    if name == "method":
        value = _METHODS.get(value, value)
    if name in ("bits", "skip", "extra"):  # repeatable on the command line
        value = [str(item) for item in (value if isinstance(value, list) else [value])]
    return name, value
