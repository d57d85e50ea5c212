"""The OpenAPI document of one server: what its requests may hold, its own limits included."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from qcompiler.runtime.server.limits import Limits

_SCHEMAS = ("CompletionRequest", "ChatRequest")
_SEEDS = {"minimum": -(1 << 63), "maximum": (1 << 63) - 1}  # too large for the floats of a JSON schema


def describe(app: FastAPI, *, name: str, limits: Limits, max_context: int) -> None:
    """Make the document say which model is served and what may be asked of it.

    Args:
        app: The application, with all of its routes.
        name: What clients call the model.
        limits: The operator's limits.
        max_context: Tokens of the model's context.
    """
    made = app.openapi()
    most_tokens = min(limits.max_tokens, max_context - 1)
    bounds: dict[str, dict[str, Any]] = {
        "model": {"enum": [name]},
        "n": {"maximum": limits.max_n},
        "max_tokens": {"maximum": most_tokens},
        "max_completion_tokens": {"maximum": most_tokens},
        "logprobs": {"maximum": limits.max_logprobs},
        "top_logprobs": {"maximum": limits.max_logprobs},
        "logit_bias": {"maxProperties": limits.max_logit_bias},
        "messages": {"maxItems": limits.max_messages},
        "seed": _SEEDS,
    }
    kinds = {"maximum": "integer", "enum": "string", "maxProperties": "object", "maxItems": "array"}
    for schema in _SCHEMAS:
        properties = made["components"]["schemas"][schema]["properties"]
        for option, bound in bounds.items():
            for place in _places(properties.get(option, {})):
                if place.get("type") == kinds[next(reversed(bound))]:
                    place.pop("exclusiveMaximum", None)
                    place.update(bound)
        for place in _places(properties["stop"]):
            if place.get("type") == "array":
                place["maxItems"] = min(limits.max_stop, place["maxItems"])
                place["items"]["maxLength"] = limits.max_stop_length
            elif place.get("type") == "string":
                place["maxLength"] = limits.max_stop_length


def _places(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schema itself, or its alternatives."""
    return schema.get("anyOf", [schema])
