"""FuseRotaryAppend: rotary of q and k and the append as one op, wherever the model puts its axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.passes import FuseRotaryAppend, InsertPagedKVCache

HEADS, KV_HEADS, D, DV, TOKENS = 4, 2, 8, 6, 9
_ops = torch.ops.qcompiler


class Layer(nn.Module):
    """One attention layer; `turn(q, k, cos, sin)` rotates [1, heads, tokens, channels]."""

    def __init__(self, turn, tables=lambda cos, sin: (cos, sin)):
        super().__init__()
        self.turn, self.tables = turn, tables
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 12)

    def forward(self, x, angles):
        q, k, v = (
            linear(x).view(1, -1, heads, width).transpose(1, 2)
            for linear, heads, width in ((self.q, HEADS, D), (self.k, KV_HEADS, D), (self.v, KV_HEADS, DV))
        )
        q, k = self.turn(q, k, *self.tables(angles.cos(), angles.sin()))
        return _ops.attention(q, k, v, 0.3, True, 0, 0, 0.0, None).transpose(1, 2).flatten(2)


def both(q, k, cos, sin):
    return _ops.rotary(q, cos, sin, False), _ops.rotary(k, cos, sin, False)


def tokens_before_heads(q, k, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return tuple(_ops.rotary(x.transpose(1, 2), cos, sin, True).transpose(1, 2) for x in (q, k))


def lowered(lab, module, kv_format=None):
    """The graph over pages, and values for its inputs."""
    x, angles = torch.randn(1, TOKENS, 16), torch.randn(1, TOKENS, D // 2).repeat(1, 1, 2)
    gm = lab.export(module, x, angles, dynamic=1)
    assert InsertPagedKVCache(kv_format=kv_format).run(gm).matched == 1
    nodes = {n.target: n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"}
    values = {
        "x": x,
        "angles": angles,
        "slots": torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4]),
        "block_table": torch.tensor([[2, 0, 1]], dtype=torch.int32),
        "query_start": torch.tensor([0, TOKENS], dtype=torch.int32),
        "seq_lens": torch.tensor([TOKENS], dtype=torch.int32),
        "max_query_len": TOKENS,
    }
    for name, value in nodes.items():
        if name not in values:
            values[name] = torch.zeros(3, 4, *value.shape[2:], dtype=value.dtype)
    return gm, values


def run(gm, values):
    """Output and pages of one run."""
    values = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
    out = gm(*(values[n.target] for n in gm.graph.nodes if n.op == "placeholder"))
    return [out, *(v for name, v in values.items() if "_pages_" in name or "_scales_" in name)]


@pytest.mark.parametrize("kv_format", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("turn", "tables"),
    [
        (both, lambda cos, sin: (cos, sin)),
        (both, lambda cos, sin: (cos.unsqueeze(1), sin.unsqueeze(1))),
        (both, lambda cos, sin: (cos[0], sin[0])),
        (both, lambda cos, sin: (cos[..., :4], sin[..., :4])),
        (tokens_before_heads, lambda cos, sin: (cos, sin)),
    ],
    ids=[
        "tables per batch",
        "tables with heads",
        "tables of tokens",
        "half of a head",
        "tokens before heads",
    ],
)
def test_three_ops_become_one(lab, turn, tables, kv_format):
    gm, values = lowered(lab, Layer(turn, tables), kv_format)
    wanted = run(gm, values)
    result = FuseRotaryAppend().run(gm)
    assert (result.matched, result.launches_saved) == (1, 2)
    assert result.bytes_saved == 2 * KV_HEADS * D * 4
    ending = "" if kv_format is None else "_quantized"
    named = [name for name in lab.ops(gm) if "rotary" in name or "append" in name]
    assert named == [f"qcompiler.rotary_kv_append{ending}.default"]
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    for got, one in zip(run(gm, values), wanted, strict=True):
        assert torch.equal(got, one)
    assert FuseRotaryAppend().run(gm).matched == 0


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (lambda q, k, c, s: (q, _ops.rotary(k, c, s, False)), "its queries are not rotated"),
        (lambda q, k, c, s: (_ops.rotary(q, c, s, False), k), "its keys are not rotated"),
        (
            lambda q, k, c, s: (both(q, k, c, s)[0] * 2.0, both(q, k, c, s)[1]),
            "queries are not rotated, or not last",
        ),
        (lambda q, k, c, s: (_ops.rotary(q, c, s, True), _ops.rotary(k, c, s, False)), "by different tables"),
        (lambda q, k, c, s: both(q, k, c[:, :1], s[:, :1]), "not one row for each token"),
    ],
)
def test_near_misses_say_why(lab, turn, reason):
    gm, values = lowered(lab, Layer(turn))
    wanted = run(gm, values)
    result = FuseRotaryAppend().run(gm)
    assert result.matched == 0
    assert [reason in skip.reason for skip in result.skipped] == [True]
    assert all(torch.equal(got, one) for got, one in zip(run(gm, values), wanted, strict=True))
