"""Storage formats, with their ops and kernels, that other installed packages bring.

A package declares an entry point in the group `qcompiler.formats`: its name is
the format's, its object a `PluginFormat`. Importing that object's module
registers the ops (`qcompiler.kernels.library.register_op`). Compiler and runtime
look here for what they do not know themselves; only what an installed package
declares is ever imported, never anything that an artifact names or holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import Format, TensorSpec, register_format
from qcompiler.kernels.library import registered_ops

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "qcompiler.formats"


@runtime_checkable
class PluginFormat(Format[Any], Protocol):
    """What a format from another package has beside the functions of `Format`.

    Attributes:
        version: Raised when the meaning of stored tensors or ops changes; an artifact that was made
            with a later version than the installed one is refused.
        ops: Names of its ops `qcompiler::<name>`, each standing for `linear(x, weight, bias)` with the
            activation as argument `x` and the bias as `bias`.
        parts: Arguments of those ops that are stored tensors, by the names of `tensor_specs`.
    """

    version: int
    ops: tuple[str, ...]
    parts: tuple[str, ...]

    def read_call(self, op: str, call: Mapping[str, Any], parts: Mapping[str, TensorSpec]) -> tuple[Any, int]:
        """The spec and in_features of a call, by which the runtime checks the tensors that it reads.

        Args:
            op: One of `ops`.
            call: The call's arguments by schema name.
            parts: Shapes and dtypes of its stored tensors.

        Raises:
            InvalidInputError: Settings that the format does not have.
        """
        ...


_lock = threading.RLock()
_loaded: dict[str, PluginFormat] = {}


def plugin_format(name: str) -> PluginFormat | None:
    """The format of this name from an installed package, loaded at first use; None if none declares it.

    Raises:
        InvalidInputError: The package that declares it does not load, or what it declares is no format.
    """
    with _lock:
        if name not in _loaded:
            for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
                _loaded[name] = _load(entry)
                break
        return _loaded.get(name)


def plugin_of(op: str) -> PluginFormat | None:
    """The format from an installed package that declares the op `qcompiler::<op>`, if any."""
    with _lock:
        for known in _loaded.values():
            if op in known.ops:
                return known
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            try:
                found = plugin_format(entry.name)
            except InvalidInputError as error:
                log.warning("%s", error)  # another package may have the op
                continue
            if found is not None and op in found.ops:
                return found
    return None


def _load(entry: EntryPoint) -> PluginFormat:
    where = f"the plug-in {entry.value!r} of format {entry.name!r}"
    builtin = set(registered_ops())
    try:
        format_ = entry.load()
    except Exception as error:  # whatever the foreign package raises
        raise InvalidInputError(
            f"{where} does not load: {error}", hint="Reinstall or remove the package that brought it."
        ) from error
    if not isinstance(format_, PluginFormat) or format_.name != entry.name:
        raise InvalidInputError(
            f"{where} is not a format of that name",
            hint="The entry point must name an object like qcompiler.kernels.formats.plugins.PluginFormat.",
        )
    for op in format_.ops:
        known = registered_ops().get(op)
        if known is None or (op in builtin and known.reference.__module__.startswith("qcompiler.")):
            raise InvalidInputError(f"{where} declares the op {op!r}, which it does not register")
    register_format(format_)
    return format_
