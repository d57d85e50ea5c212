"""Typed errors of the whole package; they live on the lowest floor so that every floor can raise them.

Each error names the thing, the reason and the way out, and carries the exit
code that the command lines use: 2 refused input, 3 quality gate, 1 our fault.
"""

from __future__ import annotations


class QCompilerError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What was wrong, with the name of the thing.
        hint: What the user can do about it, if anything.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InvalidInputError(QCompilerError):
    """The user's input (option, checkpoint, tensor) was refused."""

    exit_code = 2


class UnsupportedModelError(InvalidInputError):
    """The model cannot be captured faithfully; names the part that stands in the way."""


class ArtifactError(InvalidInputError):
    """The artifact is damaged, hostile or of another version; names the file."""


class PassError(QCompilerError):
    """A graph pass that was asked for matched nothing, or left a graph that does not lint."""


class QualityGateError(QCompilerError):
    """The compiled model missed the quality that the user demanded."""

    exit_code = 3
