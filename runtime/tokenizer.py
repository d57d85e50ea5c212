"""Text to tokens and back, by the tokenizers library alone.

Special tokens are put in front and behind as tokenizer.json's own
post-processor does, and only then. `TextStream` turns a growing list of tokens
into pieces of text that never hold half a character, and holds back what may
become a stop string.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import ArtifactError, InvalidInputError

MAX_TEXT = 64 << 20  # characters
_BROKEN = "\ufffd"
# A character takes at most 4 tokens of byte-level BPE; beyond a few more, what is broken stays broken.
_MAX_HELD = 16


class Tokenizer:
    """A tokenizer.json; `config` is tokenizer_config.json, of which only token names are read.

    Raises:
        ArtifactError: the file is not a tokenizer.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None = None):
        from tokenizers import Tokenizer as Backend

        with _library_errors(f"{path.name}: not a tokenizer"):
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
            self._backend.no_padding()
            self._backend.no_truncation()
            self._backend.decode(self._backend.encode("a").ids)  # some faults show only in use
        # Whether special tokens are read in a text is a state of the library's object.
        self._lock = threading.Lock()
        self.config = config or {}
        self.special_tokens = {
            key: text for key in _SPECIAL if (text := _content(self.config.get(key))) is not None
        }

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that are read as special tokens, the longest first."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(sorted({t.content for t in added if t.special and t.content}, key=len, reverse=True))

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact text, or None."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: At most `MAX_TEXT` characters, no lone surrogates.
            add_special_tokens: Apply the post-processor (e.g. a leading BOS).
            parse_special: Read "</s>" in the text as the token; otherwise as four characters.

        Raises:
            InvalidInputError: the text cannot be encoded.
        """
        if not isinstance(text, str):
            raise InvalidInputError(f"a prompt must be text, not {type(text).__name__}")
        if len(text) > MAX_TEXT:
            raise InvalidInputError(f"a text of {len(text)} characters is longer than {MAX_TEXT}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise InvalidInputError(f"the text is not valid Unicode: lone surrogate at {e.start}") from None
        with self._lock, _library_errors("the tokenizer failed on this text"):
            self._backend.encode_special_tokens = not parse_special
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        try:  # no context manager: this is done for every token that is served
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as e:
            raise _library_error(e, "the tokenizer failed on these tokens") from e


class Detokenizer:
    """Tokens in, text out as soon as it is certain; the pieces together are the text of all tokens.

    A window of recent tokens is decoded before and after each addition and the
    difference is the piece, because decoders (leading spaces, byte fallback)
    look at neighbours. A window that ends in an unfinished character waits.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # tokens whose text has been given out
        self._anchor = 0  # the window starts here, where a character starts

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._ids.extend(ids)
        before, after = self._window()
        if after.endswith(_BROKEN) and len(self._ids) - self._done < _MAX_HELD:
            return ""
        return self._advance(before, after)

    def flush(self) -> str:
        """What was held back, now that no more tokens come."""
        before, after = self._window()
        return self._advance(before, after)

    def _window(self) -> tuple[str, str]:
        tail = self._ids[self._anchor :]
        return self._tokenizer.decode(tail[: self._done - self._anchor]), self._tokenizer.decode(tail)

    def _advance(self, before: str, after: str) -> str:
        piece = after[len(before) :]
        if not after.endswith(_BROKEN):
            # Only tokens that give text may start the next window: a decoder strips what leads a text.
            if piece:
                self._anchor = self._done
            self._done = len(self._ids)
        else:
            self._done = len(self._ids)
        return piece


class TextStream:
    """Detokenizes and watches for stop strings; text that may become one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Text that is now certain; a complete stop string sets `stopped` and ends the text before it."""
        return "" if self.stopped else self._release(self._detokenizer.add(ids), final=False)

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        return "" if self.stopped else self._release(self._detokenizer.flush(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        pending = self._held + piece
        found = [at for s in self._stop if (at := pending.find(s)) >= 0]
        if found:
            self.stopped = True
            keep, self._held = pending[: min(found)], ""
        else:
            cut = len(pending) if final else len(pending) - self._partial(pending)
            keep, self._held = pending[:cut], pending[cut:]
        self.text += keep
        return keep

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as e:
        raise _library_error(e, what) from e


def _library_error(error: BaseException, what: str) -> ArtifactError:
    """The library raises plain `Exception`, and on a file that contradicts itself a panic beyond that."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return ArtifactError(f"{what}: {str(error)[:200]}")


def _content(token: Any) -> str | None:
    """A special token in tokenizer_config.json is its text or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
