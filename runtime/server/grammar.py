"""Text that follows a JSON schema: which tokens may come next, by llguidance (optional)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.model import Model

_MAX_SCHEMA = 256 << 10
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class JsonConstraint:
    """A request's place in a grammar; see `Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> JsonConstraint:
        """Another one at the same place."""
        return JsonConstraint(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next: bool [vocabulary].

        Raises:
            QCompilerError: the grammar grew beyond the library's bounds.
        """
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = words.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        return bits.flatten()[: self._vocab_size].bool()

    def accept(self, token: int) -> bool:
        """Take the token that came; True if the text is complete."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise QCompilerError(f"response_format: {self._matcher.get_error()[:300]}")


class Grammars:
    """Makes constraints for a model; reads its tokenizer once."""

    def __init__(self, model: Model):
        self._model = model
        self._tokenizer: Any = None

    def constraint(self, format_: Mapping[str, Any]) -> JsonConstraint | None:
        """The constraint of a `response_format`; None for plain text.

        Raises:
            InvalidInputError: the schema is missing, too large, or not one that can be followed; or the
                library is not installed.
        """
        kind = format_.get("type")
        if kind == "text":
            return None
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidInputError(
                f"response_format {kind!r} is not served here", hint="It needs the package llguidance."
            )
        return self._compile(_ANY_OBJECT if kind == "json_object" else _schema_of(format_))

    def _compile(self, schema: dict[str, Any]) -> JsonConstraint:
        from llguidance import LLMatcher, LLTokenizer

        vocab_size = self._model.engine.vocab_size
        if self._tokenizer is None:
            path = self._model.artifact.path("tokenizer.json")
            eos = list(self._model.engine.eos_token_ids)
            if path is None or not eos:
                raise InvalidInputError("response_format needs a tokenizer and an end-of-text token")
            self._tokenizer = LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos)
        # No free whitespace: a model that likes it would never come to an end.
        grammar = LLMatcher.grammar_from_json_schema(
            json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInputError(f"response_format: {matcher.get_error()[:300]}")
        return JsonConstraint(matcher, vocab_size)


def _schema_of(format_: Mapping[str, Any]) -> dict[str, Any]:
    named = format_.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, dict):
        raise InvalidInputError("response_format: json_schema.schema must be an object")
    try:
        size = len(json.dumps(schema))
    except RecursionError:
        size = _MAX_SCHEMA + 1
    if size > _MAX_SCHEMA:
        raise InvalidInputError(f"response_format: the schema is larger than {_MAX_SCHEMA} characters")
    return schema
