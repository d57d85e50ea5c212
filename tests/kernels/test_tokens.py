"""Tokens chosen and handed on by kernels: as `greedy` of the sampler and plain indexing would."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned, to_target

from qcompiler.runtime.sampling import greedy


@on_triton
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (3, 2048), (9, 5001)])
def test_the_likeliest_token_of_each_row(target, rows, vocabulary):
    from qcompiler.kernels.triton.tokens import greedy_tokens

    # Few values: most rows have their largest many times, in several blocks.
    logits = torch.randint(-3, 3, (rows, vocabulary)).float()
    if rows == 9:
        logits[3, 70], logits[4], logits[5, 3000], logits[6, 4] = (
            float("nan"), -float("inf"), float("inf"), -float("inf"),
        )  # fmt: skip
        logits[7] = -float("inf")
        logits[7, 4999] = -1e30 if target[1] != torch.float16 else -6e4
    (given,) = to_target(target, logits)
    kept = torch.full((rows + 2,), 77, dtype=torch.int64, device=given.device)
    wanted = greedy(given.cpu())
    tokens = greedy_tokens(poisoned(given), kept)
    assert tokens.tolist() == wanted.tolist()
    assert kept.tolist() == [*wanted.tolist(), 77, 77]
    if rows == 9:
        assert wanted[3:8].tolist()[:3] == [-1, -1, -1]
        assert wanted[7] == 4999


@on_triton
@pytest.mark.parametrize("count", [1, 5, 300])
def test_ids_are_taken_by_row_where_they_are_not_known(target, count):
    from qcompiler.kernels.triton.tokens import feed_tokens

    device = target[0]
    ids = torch.randint(0, 1000, (1, count))
    kept = torch.randint(-1, 1000, (count,))
    kept[-1] = -1
    feeds = torch.randint(-1, count, (count,))
    feeds[0] = count - 1
    wanted = torch.where(feeds < 0, ids[0], kept[feeds.clamp_min(0)].clamp_min(0))
    fed = feed_tokens(ids.to(device), feeds.to(device), kept.to(device))
    assert fed.tolist() == [wanted.tolist()]
