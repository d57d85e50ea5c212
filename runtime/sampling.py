"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, penalties.

The processors are those of transformers, in its order: repetition penalty,
temperature, top-k, top-p, min-p. Presence and frequency penalty and biases,
which come right after the repetition penalty, are those of OpenAI's API: they
count generated tokens only. A token is drawn by inverting the cumulative
distribution, in vocabulary order, at one uniform number from the request's
own generator; so what a request draws does not depend on its neighbours.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch

from qcompiler.kernels.errors import InvalidInputError

MAX_TOKENS = 1 << 24
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_BIASES = 1024
_LEAST_TEMPERATURE = 1e-4
# On a GPU, draw tokens by the kernel made for it; otherwise by `invert` there too.
DRAW_KERNEL = True


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; every field is checked.

    Args:
        temperature: Divides the logits; 0 is greedy, and below 1e-4 it divides by 1e-4.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: Drop tokens less likely than this times the most likely one, in [0, 1].
        repetition_penalty: Logits of tokens seen before are divided by this if positive, else multiplied;
            in [0.01, 1e4].
        presence_penalty: Subtracted from the logits of tokens generated before, in [-2, 2].
        frequency_penalty: Subtracted once for each time that a token was generated, in [-2, 2].
        logit_bias: Pairs (token id, number in [-100, 100] that is added to its logit).
        seed: Makes sampling repeatable; None draws a fresh one.
        max_tokens: Most tokens to generate.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Tokens that end the text, beside the model's own.
        ignore_eos: Go on after the model's end-of-text tokens.

    Raises:
        InvalidInputError: a value out of range; names the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) > MAX_STOPS:
                raise InvalidInputError(f"{name} must be a list of at most {MAX_STOPS}")
            object.__setattr__(self, name, tuple(value))
        self._number("temperature", 0.0, 1e4)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 1e4)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._biases()
        self._integer("top_k", 0, 1 << 24)
        self._integer("max_tokens", 1, MAX_TOKENS)
        if self.seed is not None:
            self._integer("seed", 0, (1 << 63) - 1)
        if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise InvalidInputError(f"stop: each string must have 1 to {MAX_STOP_LENGTH} characters")
        if not all(type(t) is int and 0 <= t < 1 << 24 for t in self.stop_token_ids):
            raise InvalidInputError("stop_token_ids: each must be a token id")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidInputError("ignore_eos must be true or false")

    @property
    def adjusts_logits(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )

    @classmethod
    def make(cls, **options: Any) -> SamplingParams:
        """From keyword options; an unknown name is an `InvalidInputError` that lists the known ones."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise InvalidInputError(
                f"unknown sampling option {unknown[0]!r}", hint=f"Known: {', '.join(sorted(known))}."
            )
        return cls(**options)

    def _number(self, name: str, least: float, most: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most or (above and value == least):
            bound = f"({least:g}, {most:g}]" if above else f"[{least:g}, {most:g}]"
            raise InvalidInputError(f"{name} must be a number in {bound}, not {value!r}")
        object.__setattr__(self, name, float(value))

    def _biases(self) -> None:
        pairs = self.logit_bias
        if not isinstance(pairs, (tuple, list)) or len(pairs) > MAX_BIASES:
            raise InvalidInputError(f"logit_bias must be a list of at most {MAX_BIASES} pairs")
        for pair in pairs:
            good = isinstance(pair, (tuple, list)) and len(pair) == 2 and type(pair[0]) is int
            if not good or not 0 <= pair[0] < 1 << 24 or type(pair[1]) not in (int, float):
                raise InvalidInputError("logit_bias: each must be a token id and a number")
            if not -100.0 <= pair[1] <= 100.0:  # false for NaN
                raise InvalidInputError(f"logit_bias must be in [-100, 100], not {pair[1]!r}")
        object.__setattr__(self, "logit_bias", tuple((int(t), float(b)) for t, b in pairs))

    def _integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            raise InvalidInputError(f"{name} must be a whole number in [{least}, {most}], not {value!r}")


class Constraint(Protocol):
    """What a request's text must be like, token by token."""

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next: bool [vocabulary], on the CPU."""

    def accept(self, token: int) -> bool:
        """Take the token that came; True if the text is complete."""


@dataclass
class SamplerState:
    """What sampling keeps of one request: its generator, how many tokens are the prompt, its constraint."""

    params: SamplingParams
    prompt_length: int = 0
    constraint: Constraint | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    _drawn: float | None = field(default=None, init=False, repr=False)  # in a step that may still fail
    _again: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        seed = self.params.seed
        self.generator.manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, by the logits as they are."""
        return self.params.temperature == 0 and not self.reads_tokens

    @property
    def reads_tokens(self) -> bool:
        """Whether the choice of a token needs those before it on the host."""
        return self.params.adjusts_logits or self.constraint is not None

    def uniform(self) -> float:
        """The request's next number in [0, 1), with 53 bits."""
        number, self._again = self._again, None
        if number is None:
            number = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        self._drawn = number
        return number

    def settle(self, *, failed: bool) -> None:
        """The step is over; if it failed, the number drawn in it is the next one again."""
        if failed and self._drawn is not None:
            self._again = self._drawn
        self._drawn = None


def sample(
    logits: torch.Tensor, states: Sequence[SamplerState], histories: Sequence[Sequence[int]]
) -> list[int]:
    """`choose`, and wait for the token ids."""
    return choose(logits, states, histories).tolist()


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row [rows, vocabulary]; −1 where logits are NaN or nothing is finite."""
    best = logits.max(-1)
    # The largest of a row with NaN is NaN. (`where` with a number would make the host wait for a GPU.)
    return best.indices.masked_fill(~torch.isfinite(best.values), -1)


def choose(
    logits: torch.Tensor, states: Sequence[SamplerState], histories: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Choose one token per row, where the logits are; the host does not wait for it.

    Args:
        logits: [rows, vocabulary], any floating dtype.
        states: One per row.
        histories: Prompt and generated tokens of each row; read only where there is a penalty.

    Returns:
        Token ids int64 [rows]; −1 for a row whose logits hold NaN or nothing finite.
    """
    scores = logits.float()
    if any(s.params.adjusts_logits for s in states):
        scores = scores.clone() if scores is logits else scores
        _adjust(scores, states, histories)
    bound = [(i, s.constraint) for i, s in enumerate(states) if s.constraint is not None]
    if bound:
        scores = scores.clone() if scores is logits else scores
        for i, constraint in bound:
            scores[i].masked_fill_(~constraint.allowed().to(scores.device), -math.inf)
    tokens = scores.argmax(-1)
    drawn = [i for i, s in enumerate(states) if s.params.temperature > 0]
    if drawn:
        uniforms = tensor_on([states[i].uniform() for i in drawn], torch.float64, scores.device)
        params = [states[i].params for i in drawn]
        if len(drawn) == len(states):
            tokens = draw(process(scores, params), uniforms)
        else:
            rows = tensor_on(drawn, torch.int64, scores.device)
            tokens[rows] = draw(process(scores[rows], params), uniforms)
    finite = torch.isfinite(scores.amax(-1))  # amax of a row with NaN is NaN
    return tokens.masked_fill(~finite, -1)


def process(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p of each row; dropped tokens become −inf.

    Args:
        scores: Logits fp32 [rows, vocabulary], after the repetition penalty.
        params: One per row, temperature above 0.
    """

    def column(values: list[float]) -> torch.Tensor:
        return tensor_on(values, scores.dtype, scores.device).unsqueeze(1)

    vocabulary = scores.shape[-1]
    # A temperature that is no fp32 number, or hardly one, would make infinities of the logits.
    scores = scores / column([max(p.temperature, _LEAST_TEMPERATURE) for p in params])
    top_k = [i for i, p in enumerate(params) if 0 < p.top_k < vocabulary]
    if top_k:
        at = tensor_on(top_k, torch.int64, scores.device)
        last = tensor_on([params[i].top_k - 1 for i in top_k], torch.int64, scores.device).unsqueeze(1)
        rows = scores[at]
        best = rows.topk(max(params[i].top_k for i in top_k), dim=-1).values
        scores[at] = rows.masked_fill(rows < best.gather(1, last), -math.inf)
    top_p = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if top_p:
        at = tensor_on(top_p, torch.int64, scores.device)
        rows = scores[at]
        ascending, order = rows.sort(dim=-1, stable=True)
        mass = ascending.softmax(-1).cumsum(-1)
        drop = mass <= 1 - column([params[i].top_p for i in top_p])
        drop[:, -1] = False
        scores[at] = rows.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -math.inf)
    if any(p.min_p > 0 for p in params):
        probabilities = scores.softmax(-1)
        floor = probabilities.amax(-1, keepdim=True) * column([p.min_p for p in params])
        scores = scores.masked_fill(probabilities < floor, -math.inf)
    return scores


def tensor_on(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values on a device, which the host does not wait for."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _adjust(scores: torch.Tensor, states: Sequence[SamplerState], histories: Sequence[Sequence[int]]) -> None:
    for i, (state, history) in enumerate(zip(states, histories, strict=True)):
        params = state.params
        penalty = params.repetition_penalty
        if penalty != 1.0 and history:
            seen = torch.tensor(sorted(set(history)), device=scores.device)
            row = scores[i, seen]
            scores[i, seen] = torch.where(row < 0, row * penalty, row / penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(history[state.prompt_length :])
            if counts:
                tokens = torch.tensor(list(counts), device=scores.device)
                times = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
                scores[i, tokens] -= params.presence_penalty + params.frequency_penalty * times
        biases = [(t, b) for t, b in params.logit_bias if t < scores.shape[-1]]
        if biases:
            tokens = torch.tensor([t for t, _ in biases], device=scores.device)
            added = torch.tensor([b for _, b in biases], dtype=scores.dtype, device=scores.device)
            scores[i].index_add_(0, tokens, added)


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """`invert`, on a GPU without writing the distribution down."""
    if scores.device.type != "cuda" or not DRAW_KERNEL:
        return invert(scores, uniforms)
    from qcompiler.kernels.triton.token_draw import draw_tokens

    return draw_tokens(scores, uniforms)


def invert(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token of each row where the cumulative probability passes the row's uniform number.

    Args:
        scores: Logits fp32 [rows, vocabulary]; −inf is never drawn.
        uniforms: fp64 [rows], in [0, 1).
    """
    cumulative = scores.double().softmax(-1).cumsum(-1)
    target = (uniforms.unsqueeze(1) * cumulative[:, -1:]).contiguous()
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    last = scores.shape[-1] - 1 - (scores > -math.inf).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)
