"""InsertPagedKVCache and InsertRagged: attention over caches and ragged sequences, all layers or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import GatherLogitsRows, InsertPagedKVCache, InsertRagged

CACHE_INPUTS = ["slots", "block_table", "query_start", "seq_lens", "max_query_len"]
PAGES = ["k_pages_0", "v_pages_0", "k_pages_1", "v_pages_1"]


class Layers(nn.Module):
    """Two attention layers: one full, one with a window; key width 8, value width 6."""

    def __init__(self, causal=True, cross=False):
        super().__init__()
        self.causal, self.cross = causal, cross
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 12)
        self.o = nn.Linear(24, 16)

    def forward(self, x):
        for window in (0, 3):
            q, k, v = (
                linear(x).view(1, -1, heads, width).transpose(1, 2)
                for linear, heads, width in ((self.q, 4, 8), (self.k, 2, 8), (self.v, 2, 6))
            )
            if self.cross and window:
                k, v = k[:, :, :1], v[:, :, :1]
            out = torch.ops.qcompiler.attention(q, k, v, 0.3, self.causal, window, 0, 0.0, None)
            x = x + self.o(out.flatten(2))
        return x


def test_each_layer_appends_to_its_pages_and_reads_them(lab):
    x = torch.randn(1, 9, 16)
    gm = lab.export(Layers(), x, dynamic=1)
    wanted = gm(x)
    assert InsertPagedKVCache().run(gm).matched == 2
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", *CACHE_INPUTS, *PAGES]
    calls = [
        str(n.target) for n in gm.graph.nodes if "kv_append" in str(n.target) or "attention" in str(n.target)
    ]
    assert calls == ["qcompiler.kv_append.default", "qcompiler.paged_attention.default"] * 2
    k_pages, v_pages = torch.full((3, 4, 2, 8), torch.nan), torch.full((3, 4, 2, 6), torch.nan)
    pages = [k_pages, v_pages, k_pages.clone(), v_pages.clone()]
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4])
    starts, lens = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    got = gm(x, slots, table, starts, lens, 9, *pages)
    assert lab.difference(got, wanted) < 1e-6
    assert not pages[0].flatten(0, 1)[slots].isnan().any()
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    text = str(gm.graph)
    assert InsertPagedKVCache().run(gm).matched == 0
    assert str(gm.graph) == text


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_quantized_cache_holds_codes_and_scales_of_its_format(lab, name):
    x = torch.randn(1, 9, 16)
    model = Layers()
    gm, rounded = lab.export(model, x, dynamic=1), lab.export(model, x, dynamic=1)
    assert InsertRagged(kv_format=name).run(rounded).matched == 2
    assert InsertPagedKVCache(kv_format=name).run(gm).matched == 2
    pages = [f"{side}_{kind}_{i}" for i in (0, 1) for kind in ("pages", "scales") for side in "kv"]
    inputs = {n.target: n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"}
    assert list(inputs) == ["x", *CACHE_INPUTS, *pages]
    calls = [str(n.target) for n in gm.graph.nodes if "_quantized" in str(n.target)]
    ops = ["qcompiler.kv_append_quantized.default", "qcompiler.paged_attention_quantized.default"]
    assert calls == ops * 2
    caches = [torch.zeros(3, 4, *inputs[n].shape[2:], dtype=inputs[n].dtype) for n in pages]
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4])
    starts, lens = torch.tensor([0, 9], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    got = gm(x, slots, table, starts, lens, 9, *caches)
    # what quality is measured with is what the cache gives
    assert lab.difference(got, rounded(x, starts, 9)) < 1e-6
    assert caches[0].count_nonzero() > 0
    assert InsertPagedKVCache(kv_format=name).run(gm).matched == 0


def test_shapes_of_the_inputs_are_symbolic_and_typed(lab):
    gm = lab.export(Layers(), torch.randn(1, 9, 16), dynamic=1)
    InsertPagedKVCache(kv_dtype=torch.float16).run(gm)
    values = {n.target: n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"}
    tokens, sequences = values["x"].shape[1], values["seq_lens"].shape[0]
    assert values["slots"].shape == (tokens,)
    assert values["slots"].dtype == torch.int64
    assert values["query_start"].shape == (sequences + 1,)
    assert {values[n].dtype for n in ("block_table", "query_start", "seq_lens")} == {torch.int32}
    assert values["k_pages_1"].shape[2:] == (2, 8)
    assert values["v_pages_1"].shape[2:] == (2, 6)
    assert values["k_pages_0"].dtype == torch.float16
    assert isinstance(values["max_query_len"], torch.SymInt)


def test_a_page_size_can_be_fixed(lab):
    gm = lab.export(Layers(), torch.randn(1, 9, 16), dynamic=1)
    InsertPagedKVCache(page_size=32).run(gm)
    assert next(n for n in gm.graph.nodes if n.target == "k_pages_0").meta["val"].shape[1] == 32


@pytest.mark.parametrize(
    "order", [(GatherLogitsRows, InsertPagedKVCache), (InsertPagedKVCache, GatherLogitsRows)]
)
def test_the_order_of_the_inputs_does_not_depend_on_that_of_the_passes(lab, order):
    gm = lab.export(Layers(), torch.randn(1, 9, 16), dynamic=1)
    for item in order:
        assert item().run(gm).matched
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    assert names == ["x", "logits_rows", *CACHE_INPUTS, *PAGES]


@pytest.mark.parametrize(
    ("options", "batch", "reasons"),
    [
        ({"causal": False}, 1, ["not causal"] * 2),
        ({"cross": True}, 1, ["cross-attention"]),
    ],
)
def test_one_layer_that_does_not_fit_leaves_all_as_they_are(lab, options, batch, reasons):
    x = torch.randn(batch, 9, 16)
    gm = lab.export(Layers(**options), x, dynamic=1)
    result, difference = lab.check_run(InsertPagedKVCache(), gm, x, matched=0)
    assert difference == 0
    assert [reason in skip.reason for skip, reason in zip(result.skipped, reasons, strict=True)] == [
        True
    ] * len(reasons)


def test_a_batch_is_no_ragged_graph(lab):
    q = torch.randn(2, 4, 9, 8)

    class Batch(nn.Module):
        def forward(self, q):
            return torch.ops.qcompiler.attention(q, q, q, 0.3, True, 0, 0, 0.0, None)

    result, _ = lab.check_run(InsertPagedKVCache(), lab.export(Batch(), q, dynamic=2), q, matched=0)
    assert "batch is not 1" in result.skipped[0].reason


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_attention_keeps_sequences_apart(lab, causal):
    x = torch.randn(1, 15, 16)
    gm = lab.export(Layers(causal), x, dynamic=1)
    wanted = torch.cat([gm(part) for part in x.split([9, 1, 5], dim=1)], dim=1)
    assert InsertRagged().run(gm).matched == 2
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == [
        "x",
        "query_start",
        "max_query_len",
    ]
    got = gm(x, torch.tensor([0, 9, 10, 15], dtype=torch.int32), 9)
    assert lab.difference(got, wanted) < 1e-6
    assert InsertRagged().run(gm).matched == 0
