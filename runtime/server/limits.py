"""What a server lets a request ask for; every bound in one place, with defaults that are safe."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcompiler.kernels.errors import InvalidInputError


class Limits(BaseModel):
    """Bounds of a server.

    Attributes:
        max_body_bytes: Largest request body (413).
        max_header_bytes: Largest request head (431).
        max_n: Most choices per prompt.
        max_prompts: Most prompts of one completions request.
        max_choices: Most sequences that one request may start: prompts times n.
        max_tokens: Most tokens per choice; the model's context bounds it anyway.
        default_max_tokens: When a completions request does not say; a chat goes on to the context's end.
        max_logprobs: Most of the likeliest tokens per position.
        max_stop: Most stop strings.
        max_stop_length: Most characters of one.
        max_logit_bias: Most tokens with a bias.
        max_messages: Most messages of a conversation.
        max_waiting: Most sequences that wait for a place (429).
        max_preparing: Most requests whose prompts are made at the same time (429).
        max_buffered: Events that wait for a slow reader before its sequence pauses.
        stall_seconds: How long a sequence waits for its reader.
        request_seconds: How long a request may take.
        template_seconds: How long a chat template may run.
        drain_seconds: How long running requests may go on after SIGTERM.
        keep_alive_seconds: How long an idle connection is kept.
        max_connections: Most connections at the same time (503).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    max_header_bytes: int = Field(default=16 << 10, ge=1024)
    max_n: int = Field(default=16, ge=1)
    max_prompts: int = Field(default=64, ge=1)
    max_choices: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=1 << 20, ge=1)
    default_max_tokens: int = Field(default=128, ge=1)
    max_logprobs: int = Field(default=20, ge=0, le=20)
    max_stop: int = Field(default=16, ge=0, le=64)
    max_stop_length: int = Field(default=256, ge=1, le=1024)
    max_logit_bias: int = Field(default=300, ge=0, le=1024)
    max_messages: int = Field(default=2048, ge=1, le=10_000)
    max_waiting: int = Field(default=256, ge=1)
    max_preparing: int = Field(default=512, ge=1)
    max_buffered: int = Field(default=1024, ge=2)
    stall_seconds: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    request_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    template_seconds: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    drain_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    keep_alive_seconds: int = Field(default=15, ge=1)
    max_connections: int = Field(default=1024, ge=1)


def read_limits(path: Path) -> Limits:
    """Limits from a JSON object; what it does not name has its default.

    Raises:
        InvalidInputError: the file cannot be read, or names an unknown limit or an impossible value.
    """
    try:
        return Limits.model_validate_json(path.read_bytes())
    except OSError as e:
        raise InvalidInputError(f"{path}: {e.strerror}") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{path}: {where} {first['msg']}") from None
