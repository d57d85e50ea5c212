"""Answers in OpenAI's shapes, whole and as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from qcompiler.runtime.stream import Event, Stream
from qcompiler.runtime.tokenizer import Tokenizer


class Reply:
    """The common part of one answer.

    Args:
        model: Name of the model as clients know it.
        chat: A chat completion, else a text completion.
        n: Choices per prompt.
        tokenizer: For the texts of log probabilities.
    """

    def __init__(self, model: str, *, chat: bool, n: int, tokenizer: Tokenizer):
        self._n = n
        self._chat = chat
        self._tokenizer = tokenizer
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl-" if chat else "cmpl-"
        self._head: dict[str, Any] = {
            "id": prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
        }
        self._head["model"] = model
        self._offsets: dict[int, int] = {}
        # What every event of the answer begins with, written once.
        head = _json({**self._head, "object": f"{kind}.chunk" if chat else kind, "choices": []})
        self._before = f"data: {head[:-2]}".encode()

    # Whole

    def whole(self, choices: list[tuple[Stream, list[Event]]]) -> dict[str, Any]:
        """The answer of streams that were read to their end."""
        return {
            **self._head,
            "choices": [self._choice(i, events) for i, (_, events) in enumerate(choices)],
            "usage": usage([s for s, _ in choices], self._n),
        }

    def _choice(self, index: int, events: list[Event]) -> dict[str, Any]:
        text = "".join(e.text for e in events)
        choice: dict[str, Any] = {
            "index": index,
            "finish_reason": events[-1].finish_reason,
            "logprobs": self._logprobs(index, events),
        }
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    # In pieces

    def opening(self, index: int) -> bytes:
        """What a chat's choice begins with."""
        if not self._chat:
            return b""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, index: int, event: Event) -> bytes:
        """A token; nothing where there is nothing to tell."""
        if not event.text and event.logprob is None and event.finish_reason is None:
            return b""
        body: dict[str, Any] = {"delta": {"content": event.text}} if self._chat else {"text": event.text}
        if self._chat and event.finish_reason is not None and not event.text:
            body = {"delta": {}}
        body["finish_reason"] = event.finish_reason
        body["logprobs"] = self._logprobs(index, [event])
        return self._chunk(index, body)

    def closing(self, streams: list[Stream], *, with_usage: bool) -> bytes:
        """The end of all choices."""
        data = b""
        if with_usage:
            data = sse(
                {**self._head, "object": self._object(), "choices": [], "usage": usage(streams, self._n)}
            )
        return data + b"data: [DONE]\n\n"

    def _chunk(self, index: int, body: dict[str, Any]) -> bytes:
        return b"%b%b]}\n\n" % (self._before, _json({"index": index, **body}).encode())

    def _object(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    # Log probabilities

    def _logprobs(self, index: int, events: Iterable[Event]) -> dict[str, Any] | None:
        found = [(e.token, e.logprob) for e in events if e.logprob is not None and e.token is not None]
        if not found:
            return None
        if self._chat:
            content = []
            for token, logprob in found:
                top = [self._entry(t, p) for t, p in logprob.top]
                content.append({**self._entry(token, logprob.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        texts = [self._text(t) for t, _ in found]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        tops = []
        for token, p in found:
            named = {self._text(t): v for t, v in reversed(p.top)}  # of equal texts the likeliest stays
            named.setdefault(self._text(token), p.logprob)
            tops.append(dict(sorted(named.items(), key=lambda item: -item[1])))
        values = [p.logprob for _, p in found]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # −inf has no JSON; OpenAI writes −9999 for what cannot be.
        value = max(logprob, -9999.0)
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8"))}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False)


def usage(streams: Iterable[Stream], choices_per_prompt: int = 1) -> dict[str, Any]:
    """Token counts; a prompt that is continued several times counts once."""
    found = list(streams)
    prompts = found[::choices_per_prompt]
    prompt = sum(s.prompt_tokens for s in prompts)
    generated = sum(len(s.token_ids) for s in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in prompts)},
    }


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(value).encode() + b"\n\n"


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
