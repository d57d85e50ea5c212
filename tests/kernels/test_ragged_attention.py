"""`qcompiler::ragged_attention`: sequences laid end to end see only themselves."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton_wide, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401

OP = torch.ops.qcompiler.ragged_attention.default
LENGTHS = {"ragged": (7, 1, 40, 0, 12), "equal": (9, 9, 9), "one": (33,), "none": (0, 0)}
OPTIONS = {
    "encoder": (0.25, False, 0, 0, 0.0, None),
    "causal": (0.25, True, 0, 0, 0.0, None),
    "window-both-ways": (0.25, False, 5, 0, 0.0, None),
}


def case(lengths, padding=2):
    g = torch.Generator().manual_seed(0)
    tokens = sum(lengths) + padding
    q = torch.randn(tokens, 4, 16, generator=g)
    k = torch.randn(tokens, 2, 16, generator=g)
    v = torch.randn(tokens, 2, 24, generator=g)
    start = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, start


def alone(q, k, v, start, options):
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for first, last in zip(start.tolist(), start.tolist()[1:], strict=False):
        if last > first:
            parts = (t[first:last].double().transpose(0, 1).unsqueeze(0) for t in (q, k, v))
            out[first:last] = torch.ops.qcompiler.attention(*parts, *options)[0]
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_reference_gives_each_sequence_what_it_gets_alone(lengths, options):
    q, k, v, start = case(LENGTHS[lengths])
    out = OP(q, k, v, start, max(LENGTHS[lengths]), *OPTIONS[options])
    assert_close(out, alone(q, k, v, start, OPTIONS[options]))


def test_opcheck():
    q, k, v, start = case(LENGTHS["ragged"])
    torch.library.opcheck(OP, (q, k, v, start, 40, *OPTIONS["encoder"]))


@on_triton_wide
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernel_agrees(lengths, options, target):
    from qcompiler.kernels.triton.attention.launch import ragged_attention

    q, k, v, start = to_target(target, *case(LENGTHS[lengths]))
    wanted = alone(q.cpu(), k.cpu(), v.cpu(), start.cpu(), OPTIONS[options])
    out = ragged_attention(
        poisoned(q), poisoned(k), poisoned(v), start, max(LENGTHS[lengths]), *OPTIONS[options]
    )
    assert_close(out, wanted)
