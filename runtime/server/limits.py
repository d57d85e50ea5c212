"""What a server lets a request ask for; every bound in one place, with defaults that are safe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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

    max_body_bytes: int = Field(4 << 20, ge=1024)
    max_header_bytes: int = Field(16 << 10, ge=1024)
    max_n: int = Field(16, ge=1)
    max_prompts: int = Field(64, ge=1)
    max_choices: int = Field(64, ge=1)
    max_tokens: int = Field(1 << 20, ge=1)
    default_max_tokens: int = Field(128, ge=1)
    max_logprobs: int = Field(20, ge=0, le=20)
    max_stop: int = Field(16, ge=0, le=64)
    max_stop_length: int = Field(256, ge=1, le=1024)
    max_logit_bias: int = Field(300, ge=0, le=1024)
    max_messages: int = Field(2048, ge=1, le=10_000)
    max_waiting: int = Field(256, ge=1)
    max_preparing: int = Field(512, ge=1)
    max_buffered: int = Field(1024, ge=2)
    stall_seconds: float = Field(30.0, gt=0, allow_inf_nan=False)
    request_seconds: float = Field(600.0, gt=0, allow_inf_nan=False)
    template_seconds: float = Field(2.0, gt=0, allow_inf_nan=False)
    drain_seconds: float = Field(30.0, ge=0, allow_inf_nan=False)
    keep_alive_seconds: int = Field(15, ge=1)
    max_connections: int = Field(1024, ge=1)
