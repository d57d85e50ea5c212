"""A conversation as tokens, such that only the template writes special tokens.

"</s>" inside a message is four characters that somebody typed. The tokenizer
cannot tell once the template has put everything into one text, so such
characters are replaced by marks before rendering and put back afterwards,
each stretch of text being encoded as what it is.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.chat import ChatTemplate
from qcompiler.runtime.tokenizer import Tokenizer

# Characters for private use: no template changes their case, trims them or matches them.
_PRIVATE, _DIGITS = 0xE000, 16
_MAX_DEPTH = 32


def chat_tokens(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Seq[Mapping[str, Any]],
    **variables: Any,
) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: Encodes the text.
        template: Writes the conversation.
        messages: Objects with role and content.
        variables: See `ChatTemplate.render`.

    Raises:
        InvalidInputError: the template refuses the messages, or a text cannot be encoded.
    """
    marks = _Marks(tokenizer.special_texts)
    text = template.render(marks.hide(messages), **variables)
    ids: list[int] = []
    for part, typed in marks.split(text):
        ids.extend(tokenizer.encode(part, add_special_tokens=False, parse_special=not typed))
    return ids


class _Marks:
    """Stands in for special tokens' texts; a fresh random mark each time, so that nobody can type it."""

    def __init__(self, texts: Seq[str]):
        self._texts = texts
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        nonce = "".join(chr(_PRIVATE + secrets.randbelow(_DIGITS)) for _ in range(16))
        self._marks = {text: nonce + chr(_PRIVATE + 256 + i) for i, text in enumerate(texts[:4096])}
        self._found = re.compile(f"{nonce}([{chr(_PRIVATE + 256)}-{chr(_PRIVATE + 256 + 4095)}])")
        self.used = False

    def hide(self, value: Any, depth: int = 0) -> Any:
        """The value with every special token's text replaced in every string."""
        if isinstance(value, str) and self._pattern is not None:
            return self._pattern.sub(self._mark, value)
        if depth >= _MAX_DEPTH:
            raise InvalidInputError(f"a message is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, Mapping):
            return {key: self.hide(v, depth + 1) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(v, depth + 1) for v in value]
        return value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Stretches of the text, and whether each was typed as a special token's text."""
        if not self.used:
            return [(text, False)]
        parts = self._found.split(text)
        stretches = []
        for i, part in enumerate(parts):
            typed = i % 2 == 1
            if typed:
                stretches.append((self._texts[ord(part) - _PRIVATE - 256], True))
            elif part:
                stretches.append((part, False))
        return stretches

    def _mark(self, match: re.Match[str]) -> str:
        self.used = True
        return self._marks[match.group()]
