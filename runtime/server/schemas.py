"""Requests as OpenAI's API has them, checked as they are read; an option that is not served is refused.

Bounds that the operator sets are checked in `options.py`; those here hold for
any operator, so that nothing large is built before anybody looks at it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# JSON has no NaN, but Python's parser takes it.
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Token = Annotated[int, Field(strict=True, ge=0, lt=1 << 24)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Prompt = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Token], Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
)


class _Base(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Base):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(_Base):
    """What both endpoints share."""

    model: str | None = Field(default=None, max_length=256)
    temperature: Number = Field(default=1.0, ge=0, le=2)
    top_p: Number = Field(default=1.0, gt=0, le=1)
    n: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Number | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Number], Field(max_length=1024)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, under the names that other servers use.
    top_k: Annotated[int, Field(strict=True, ge=-1, le=1 << 24)] = 0
    min_p: Number = Field(default=0.0, ge=0, le=1)
    repetition_penalty: Number = Field(default=1.0, ge=0.01, le=10)
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    # Taken, and without effect here.
    user: str | None = Field(default=None, max_length=1024)
    metadata: dict[str, str] | None = None
    store: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=1 << 24)] | None = None
    echo: Literal[False] | None = False
    best_of: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    suffix: None = None


class TextPart(_Base):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Base):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: str | None = Field(default=None, max_length=256)

    def plain(self) -> dict[str, Any]:
        """The message as templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ResponseFormat(_Base):
    """How the text must be built."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema"]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=1 << 24)] | None = None
    response_format: ResponseFormat | None = None
