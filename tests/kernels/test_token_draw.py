"""Tokens drawn by a kernel: those of the cumulative distribution that plain torch makes."""

from __future__ import annotations

import math

import pytest
import torch
from devices import on_triton_wide, poisoned

from qcompiler.runtime.sampling import invert


@on_triton_wide
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 5), (2, 2048), (40, 5001)])
@pytest.mark.parametrize("kept", ["all", "few", "one"])
def test_the_token_at_which_the_mass_passes_a_number(target, rows, vocabulary, kept):
    from qcompiler.kernels.triton.token_draw import draw_tokens

    device, dtype = target
    if dtype != torch.float32:
        pytest.skip("scores are float32")
    g = torch.Generator().manual_seed(rows + vocabulary)
    scores = torch.randn(rows, vocabulary, generator=g) * 3
    if kept != "all":
        count = 3 if kept == "few" else 1
        chosen = torch.rand(rows, vocabulary, generator=g).topk(count, dim=-1).indices
        scores = torch.full_like(scores, -math.inf).scatter(1, chosen, scores.gather(1, chosen))
    uniforms = torch.rand(rows, dtype=torch.float64, generator=g)
    uniforms[0] = 0.0
    uniforms[-1] = 1 - 2.0**-53
    wanted = invert(scores, uniforms)
    drawn = draw_tokens(poisoned(scores.to(device)), uniforms.to(device)).cpu()
    assert torch.equal(drawn, wanted)
    assert torch.isfinite(scores.gather(1, drawn.unsqueeze(1))).all()


@on_triton_wide
def test_rows_that_make_no_sense_give_some_token(target):
    from qcompiler.kernels.triton.token_draw import draw_tokens

    scores = torch.zeros(3, 3000)
    scores[0], scores[1, 5], scores[2] = -math.inf, math.nan, math.nan
    drawn = draw_tokens(scores.to(target[0]), torch.full((3,), 0.7, dtype=torch.float64, device=target[0]))
    assert ((drawn >= 0) & (drawn < 3000)).all()
