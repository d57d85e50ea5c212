"""From a request to what the service runs: prompts and sampling options, within the operator's limits."""

from __future__ import annotations

from dataclasses import replace

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.model import Model
from qcompiler.runtime.sampling import SamplingParams
from qcompiler.runtime.server.grammar import Grammars
from qcompiler.runtime.server.limits import Limits
from qcompiler.runtime.server.schemas import ChatRequest, CompletionRequest, Sampling
from qcompiler.runtime.service import Request


def completion_requests(body: CompletionRequest, model: Model, limits: Limits) -> list[Request]:
    """Each prompt `n` times, in OpenAI's order.

    Raises:
        InvalidInputError: beyond a limit.
    """
    prompts = _prompts(body)
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise InvalidInputError("best_of is served only where it equals n")
    _at_most("the number of prompts", len(prompts), limits.max_prompts)
    _check_n(n, len(prompts), limits)
    if body.logprobs is not None:
        _at_most("logprobs", body.logprobs, limits.max_logprobs)
    limit = body.max_tokens or limits.default_max_tokens
    params = sampling_params(body, min(limit, model.max_context), limits)
    _check_max_tokens(body.max_tokens, model, limits)
    tokens = [model.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    return [r for p in tokens for r in _choices(p, params, n, body.logprobs, body.max_tokens, model)]


def chat_requests(body: ChatRequest, model: Model, limits: Limits, grammars: Grammars) -> list[Request]:
    """The conversation `n` times; see `completion_requests`."""
    _at_most("the number of messages", len(body.messages), limits.max_messages)
    n = body.n or 1
    _check_n(n, 1, limits)
    logprobs = None
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidInputError("top_logprobs needs logprobs: true")
    if body.logprobs:
        logprobs = body.top_logprobs or 0
        _at_most("top_logprobs", logprobs, limits.max_logprobs)
    wanted = body.max_completion_tokens or body.max_tokens
    _check_max_tokens(wanted, model, limits)
    params = sampling_params(body, min(wanted or model.max_context, limits.max_tokens), limits)
    tokens = model.chat_tokens([m.plain() for m in body.messages])
    requests = _choices(tokens, params, n, logprobs, wanted, model)
    constraint = grammars.constraint(body.response_format.model_dump()) if body.response_format else None
    if constraint is None:
        return requests
    if body.ignore_eos:
        raise InvalidInputError("response_format does not go with ignore_eos")
    return [replace(r, constraint=constraint.copy()) for r in requests]


def sampling_params(body: Sampling, max_tokens: int, limits: Limits) -> SamplingParams:
    """The sampling options of a request.

    Raises:
        InvalidInputError: beyond a limit.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    _at_most("the number of stop strings", len(stop), limits.max_stop)
    _at_most("the length of a stop string", max(map(len, stop), default=0), limits.max_stop_length)
    biases = body.logit_bias or {}
    _at_most("the number of logit biases", len(biases), limits.max_logit_bias)
    pairs = []
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and len(token) < 9):
            raise InvalidInputError("logit_bias: keys must be token ids")
        pairs.append((int(token), bias))
    return SamplingParams(
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(pairs),
        seed=None if body.seed is None else body.seed % (1 << 63),
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
    )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    several: list[str | list[int]] = [p for p in given if not isinstance(p, int)]
    return several or [[t for t in given if isinstance(t, int)]]


def _choices(
    tokens: list[int], params: SamplingParams, n: int, logprobs: int | None, wanted: int | None, model: Model
) -> list[Request]:
    engine = model.engine
    engine.check_tokens(tokens, room=wanted or 1)
    # What a request may come to is bounded by the pages that exist, unless it asked for more itself.
    if wanted is None:
        room = engine.executor.num_pages * engine.executor.page_size - len(tokens)
        params = replace(params, max_tokens=max(1, min(params.max_tokens, room)))
    requests = []
    for i in range(n):
        seed = None if params.seed is None else (params.seed + i) % (1 << 63)
        requests.append(Request(tokens, replace(params, seed=seed), logprobs))
    return requests


def _check_n(n: int, prompts: int, limits: Limits) -> None:
    _at_most("n", n, limits.max_n)
    _at_most("prompts times n", n * prompts, limits.max_choices)


def _check_max_tokens(value: int | None, model: Model, limits: Limits) -> None:
    if value is not None:
        _at_most("max_tokens", value, min(limits.max_tokens, model.max_context - 1))


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidInputError(f"{name} is {value}, at most {most} is served")
