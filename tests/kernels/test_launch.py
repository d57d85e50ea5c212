"""Row addressing of strided inputs: every row is found in place, copies are made only where unavoidable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from qcompiler.kernels.triton.launch import (
    EARLY,
    EARLY_WITH_WEIGHTS,
    IN_TURN,
    allow_early_starts,
    as_rows,
    early_start,
    next_power_of_2,
    starts_early,
)


def gathered(x):
    """Rows of x as the kernels address them."""
    source, rows, inner, outer_stride, inner_stride = as_rows(x)
    row = torch.arange(rows)
    base = row // inner * outer_stride + row % inner * inner_stride
    at = source.storage_offset() + base[:, None] + torch.arange(x.shape[-1])
    return torch.as_strided(source, (source.untyped_storage().nbytes() // 4,), (1,), 0)[at]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    cut=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    swap=st.booleans(),
    last=st.booleans(),
)
def test_rows_are_found_in_any_view(sizes, cut, swap, last):
    buffer = torch.arange(float(torch.tensor([s + 2 for s in sizes]).prod())).view([s + 2 for s in sizes])
    x = buffer[tuple(slice(c, c + s) for s, c in zip(sizes, cut, strict=False))]
    if swap and x.dim() > 1:
        x = x.transpose(0, -1 if last else x.dim() - 2)
    assert torch.equal(gathered(x), x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize(
    "view",
    [
        lambda fused: fused[..., 64:],
        lambda fused: fused[..., 64:].unflatten(-1, (4, 16)),
        lambda fused: fused[:, :, :64].unflatten(-1, (4, 16)).transpose(1, 2),
    ],
    ids=["slice", "heads", "heads-first"],
)
def test_views_into_a_fused_projection_are_not_copied(view):
    fused = torch.randn(1, 7, 128)
    assert as_rows(view(fused))[0].untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


def test_kernels_start_early_only_where_a_device_can():
    assert not starts_early(torch.device("cpu"))
    assert early_start(torch.device("cpu")) == {"PDL": IN_TURN}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("level", [IN_TURN, EARLY, EARLY_WITH_WEIGHTS])
def test_how_kernels_start_can_be_chosen(level):
    device = torch.device("cuda")
    early = level > IN_TURN and torch.cuda.get_device_capability() >= (9, 0)
    before = allow_early_starts(level)
    try:
        assert early_start(device) == ({"PDL": level, "launch_pdl": True} if early else {"PDL": IN_TURN})
    finally:
        assert allow_early_starts(before) == level
