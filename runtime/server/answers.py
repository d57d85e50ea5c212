"""Answers as the OpenAPI document tells them; they are written by `replies.py` and `faults.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "aborted"]


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Exact):
    """What was wrong, and with what."""

    message: str
    type: str
    param: str | None
    code: int


class Error(_Exact):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class PromptDetails(_Exact):
    """Of the prompt tokens, those found in the cache."""

    cached_tokens: int


class Usage(_Exact):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class _Answer(_Exact):
    id: str
    created: int
    model: str
    usage: Usage


class TextLogprobs(_Exact):
    """Log probabilities of a text completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Exact):
    """One continuation of one prompt."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class Completion(_Answer):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class LikelyToken(_Exact):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken):
    """The token that came, and the likeliest ones at its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Exact):
    """Log probabilities of a message."""

    content: list[ChosenToken]
    refusal: None


class AssistantMessage(_Exact):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Exact):
    """One answer to the conversation."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelEntry(_Exact):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Exact):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class State(_Exact):
    """Answer of /health and /ready."""

    status: Literal["ok", "unavailable"]


_EVENTS: dict[str, Any] = {
    "text/event-stream": {"schema": {"description": "With stream: true; the last event is [DONE]."}}
}
_REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "Refused: the request, its key, origin or size; or too many (429)"}
}
_FAILED: dict[int | str, dict[str, Any]] = {
    500: {"model": Error, "description": "The request failed"},
    503: {"model": Error, "description": "Draining, or the device is lost"},
    504: {"model": Error, "description": "The request took too long"},
}


def generates(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Answers of an endpoint that runs the model."""
    return {200: {"model": answer, "content": _EVENTS}, **_REFUSED, **_FAILED}


def tells(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Answers of an endpoint that only says something."""
    return {200: {"model": answer}, **_REFUSED}


STATE: dict[int | str, dict[str, Any]] = {
    **tells(State),
    503: {"model": State, "description": "Not any more, or not yet"},
}
METRICS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "description": "Prometheus' text format",
    },
    **_REFUSED,
}
