"""Body and tail with the solver of an affine method.

The largest weights of each block are the tail; the solver sees their groups without them, so that the
body's range shrinks and its steps get finer. A tail weight takes the body's nearest code, an end of the
range, and the tail stores what is missing. Then the slots go to the weights whose error counts most
under that body, and the body is solved once more without these.

`choose_fraction` settles `auto`. Another body bit takes a quarter of the squared error, so a tail
that is worth its bits has a small error · 4^(bits per weight); the fraction is the one where that is
least over samples of the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.kernels.formats.body_tail import BODY_TAIL, BodyTailSpec, in_blocks, tail_layout
from qcompiler.methods.affine import CHUNK_WEIGHTS, AffineMethod, check_weight, constant_groups_exact

AUTO = "auto"
FRACTIONS = (0.004, 0.008, 0.012, 0.02, 0.032)
_ROUNDS = 2


def parse_fraction(text: str) -> float | None:
    """The fraction that `--tail-fraction` means; 0 for none, None for auto.

    Raises:
        InvalidInputError: Neither `auto` nor a number from 0 to 0.25.
    """
    if text == AUTO:
        return None
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 0.25:
        raise InvalidInputError(
            f"a tail fraction cannot be {text!r}", hint="Give a part of the weights up to 0.25, or auto."
        )
    return fraction


def quantize_body_tail(
    method: AffineMethod,
    weight: Tensor,
    spec: BodyTailSpec,
    options: Mapping[str, Any],
    *,
    name: str = "weight",
    chunk_weights: int | None = None,
) -> dict[str, Tensor]:
    """The body_tail format's tensors of a weight.

    Args:
        method: Solves the body.
        weight: [out_features, in_features], floating point.
        spec: The format's settings.
        options: The method's options, complete.
        name: The tensor's name, for error messages.
        chunk_weights: As for `AffineMethod.solve`.

    Raises:
        InvalidInputError: See `AffineMethod.solve`.
    """
    check_weight(weight, spec.body, name)
    statistics = method.statistics(weight, options)
    if chunk_weights is None:
        chunk_weights = CHUNK_WEIGHTS.get(weight.device.type, 1 << 20)
    parts = []
    for rows in weight.split(max(1, chunk_weights // weight.shape[1])):
        values = rows.float()
        importance = method.importance(values, statistics)
        if importance is None:
            importance = torch.ones_like(values)
        chosen = _largest(values.abs(), spec)
        for _ in range(_ROUNDS):
            codes, scales, zeros, rest = _body(method, values, importance, chosen, spec.body)
            chosen = _largest(importance * rest.square(), spec)
        parts.append(BODY_TAIL.pack(spec, AFFINE.pack(spec.body, codes, scales, zeros), rest, chosen))
    return BODY_TAIL.concat(spec, parts)


def choose_fraction(
    method: AffineMethod, samples: Sequence[Tensor], spec: BodyTailSpec, options: Mapping[str, Any]
) -> float:
    """The fraction of `FRACTIONS` whose tail is most worth its bits on samples of weights; see the top.

    Args:
        method: Solves the body.
        samples: Rows of the model's weights, each [rows, in_features].
        spec: All settings but the fraction.
        options: The method's options, complete.
    """
    costs = {}
    for fraction in FRACTIONS:
        tried = BodyTailSpec(spec.bits, spec.group_size, fraction, spec.tail_bits, spec.scale_dtype)
        cost = 0.0
        for sample in samples:
            values = sample.float()
            importance = method.importance(values, method.statistics(values, options))
            if importance is None:
                importance = torch.ones_like(values)
            tensors = quantize_body_tail(method, values, tried, options)
            left = values - BODY_TAIL.dequantize(tried, tensors, values.shape[1], torch.float32)
            error = float((importance * left.square()).sum() / (importance * values.square()).sum())
            cost += error * 4 ** BODY_TAIL.bits_per_weight(tried, *values.shape)
        costs[fraction] = cost
    return min(costs, key=lambda fraction: costs[fraction])


def _largest(score: Tensor, spec: BodyTailSpec) -> Tensor:
    """As many True as there are slots in each block, at the largest scores; bool [rows, columns]."""
    columns = score.shape[1]
    _, slots, block = tail_layout(spec, columns)
    blocks = in_blocks(score + 1e-30, block)  # padding stays below
    chosen = torch.zeros_like(blocks, dtype=torch.bool)
    chosen.scatter_(2, blocks.topk(slots, dim=2).indices, True)
    return chosen.flatten(1)[:, :columns]


def _body(
    method: AffineMethod, values: Tensor, importance: Tensor, chosen: Tensor, spec: AffineSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The body without the chosen weights: codes of all weights, scales, zeros, and weight less body."""
    columns = values.shape[1]
    size = spec.group_size or columns
    whole = columns // size * size
    found = []
    for side, width in ((slice(0, whole), size), (slice(whole, columns), columns - whole)):
        if side.start == side.stop:
            continue
        w, u, tail = (part[:, side].reshape(-1, width) for part in (values, importance, chosen))
        found.append(_equal_groups(method, w, u, tail, spec, len(values)))
    codes, scales, zeros, rest = (torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
    return codes.to(torch.uint8), scales, zeros, rest


def _equal_groups(
    method: AffineMethod, values: Tensor, importance: Tensor, chosen: Tensor, spec: AffineSpec, rows: int
) -> tuple[Tensor, ...]:
    """`_body` of groups [groups, size] of `rows` rows."""
    kept = torch.where(chosen, 0.0, importance)
    # In the place of a tail weight stands the mean of the others: it widens no range and counts for nothing.
    mean = (kept * values).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp_min(1e-30)
    low = torch.where(chosen, float("inf"), values).amin(dim=1, keepdim=True)
    high = torch.where(chosen, float("-inf"), values).amax(dim=1, keepdim=True)
    mean = torch.where(low <= high, torch.minimum(torch.maximum(mean, low), high), 0.0)
    body = torch.where(chosen, mean, values)
    weights = torch.where(chosen, importance.amin(dim=1, keepdim=True) * 1e-6, importance)
    found = constant_groups_exact(body, method.solve_groups(body, spec, weights), spec)
    ends = torch.round(values / found.scales + found.zeros).clamp_(0.0, 2.0**spec.bits - 1)
    codes = torch.where(chosen, ends, found.codes)
    rest = values - (codes - found.zeros) * found.scales
    return tuple(part.reshape(rows, -1) for part in (codes, found.scales, found.zeros, rest))
