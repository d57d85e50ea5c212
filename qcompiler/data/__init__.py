"""Text that ships with the package for evaluation and calibration; see SOURCES.md for its licence."""

from __future__ import annotations

from importlib.resources import files

from qcompiler.kernels.errors import InvalidInputError

TEXTS = ("eval", "calib")


def default_text(name: str) -> str:
    """A shipped text: `eval` for quality figures, `calib` for methods that look at activations.

    The two share no document; documents are separated by two blank lines.

    Raises:
        InvalidInputError: No such text.
    """
    if name not in TEXTS:
        raise InvalidInputError(f"there is no shipped text {name!r}", hint=f"Choose from {', '.join(TEXTS)}.")
    return files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
