"""`qcompiler::paged_attention`: each sequence alone through the dense op is what the batch must give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import on_triton, on_triton_wide
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import CASES, PagedCase
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401

OP = torch.ops.qcompiler.paged_attention.default


@pytest.mark.parametrize("name", CASES)
def test_reference_gives_each_sequence_what_it_gets_alone(name):
    case = CASES[name]
    arguments, parts, chosen = case.build()
    assert_close(OP(*arguments), case.expected(parts, chosen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixed-with-padding", "decode", "softcap-sinks-decode"])
def test_reference_keeps_the_dtype(name, dtype):
    case = CASES[name]
    arguments, parts, chosen = case.build(dtype)
    out = OP(*arguments)
    assert out.dtype == dtype
    assert_close(out, case.expected(parts, chosen))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=5),
    page_size=st.integers(1, 9),
    window=st.sampled_from([0, 0, 1, 5]),
    padding=st.integers(0, 3),
)
def test_reference_on_any_ragged_batch(lengths, page_size, window, padding):
    case = PagedCase(
        tuple(n for n, _ in lengths),
        tuple(min(n, rows) for n, rows in lengths),
        page_size=page_size,
        padding_rows=padding,
        options={"window": window},
    )
    arguments, parts, chosen = case.build()
    assert_close(OP(*arguments), case.expected(parts, chosen))


def test_adjacent_pages_are_read_in_place():
    case = PagedCase((21,), (4,), page_size=4)
    arguments, parts, chosen = case.build()
    q, k_pages, v_pages, table, *rest = arguments
    order = table[0, :6].long()
    k_sorted, v_sorted = k_pages[order].contiguous(), v_pages[order].contiguous()
    straight = torch.arange(6, dtype=torch.int32)[None]
    assert_close(OP(q, k_sorted, v_sorted, straight, *rest), case.expected(parts, chosen))


@pytest.mark.parametrize("name", ["mixed-with-padding", "decode"])
def test_opcheck(name):
    arguments, _, _ = replace(CASES[name], padding_rows=0).build()
    pages = [t.nan_to_num() for t in arguments[1:3]]
    torch.library.opcheck(OP, (arguments[0], *pages, *arguments[3:]))


@on_triton_wide
@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_each_sequence_what_it_gets_alone(name, target):
    from qcompiler.kernels.triton.attention.launch import paged_attention

    device, dtype = target
    case = CASES[name]
    arguments, parts, chosen = case.build(dtype, device)
    assert_close(paged_attention(*arguments), case.expected(parts, chosen))


@on_triton
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", ["decode-padded-graph", "softcap-sinks-decode", "window-decode"])
def test_decode_does_not_depend_on_the_number_of_splits(name, splits, target, monkeypatch):
    from qcompiler.kernels.triton.attention import launch as attention

    monkeypatch.setattr(attention, "decode_splits", lambda *_: splits)
    device, dtype = target
    case = CASES[name]
    arguments, parts, chosen = case.build(dtype, device)
    assert_close(attention.paged_attention(*arguments), case.expected(parts, chosen))


@pytest.mark.parametrize("programs", [1, 8, 100, 264, 5000])
@pytest.mark.parametrize("max_keys", [1, 128, 4096, 131072])
def test_splits_fill_the_gpu_without_splitting_tiles(programs, max_keys):
    from qcompiler.kernels.triton.attention.launch import decode_splits

    splits = decode_splits(programs, max_keys, 64, 132)
    assert splits == 1 or max_keys // splits >= 2 * 64
    assert splits == 1 or programs * splits <= 2 * 132


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_decode_replays_in_a_cuda_graph_for_other_lengths():
    case = CASES["decode-padded-graph"]
    arguments, parts, chosen = case.build(torch.float16, "cuda")
    seq_lens = arguments[5]
    OP(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(*arguments)
    graph.replay()
    assert_close(out, case.expected(parts, chosen))
    seq_lens.copy_(torch.tensor([4, 50, 0, 0]))
    graph.replay()
    shorter = [(q, k[:, :, :n], v[:, :, :n]) for (q, k, v), n in zip(parts, (4, 50, 0, 0), strict=True)]
    assert_close(out, case.expected(shorter, chosen))
