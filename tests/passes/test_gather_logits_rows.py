"""GatherLogitsRows: only the wanted rows reach the norm, lm_head and whatever else works row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.errors import PassError
from qcompiler.passes import FuseRMSNorm, GatherLogitsRows, PassManager, canonical_passes


class Tail(nn.Module):
    """Mixes tokens, then a row-wise block, a norm and a head."""

    def __init__(self, finish=None):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 20, bias=False)
        self.finish = finish

    def forward(self, x):
        x = x + self.mix(x.cumsum(1))
        x = x + self.down(self.up(x).tanh())
        logits = self.head(self.norm(x))
        return logits if self.finish is None else self.finish(logits)


X = torch.randn(1, 9, 8)
ROWS = torch.tensor([8, 2, 2])


def gathered_inputs(gm):
    return [n.args[0].name for n in gm.graph.nodes if str(n.target) == "aten.index_select.default"]


def run(lab, module):
    gm = lab.export(module, X, dynamic=1)
    FuseRMSNorm().run(gm)
    wanted = gm(X)[:, ROWS]
    result = GatherLogitsRows().run(gm)
    assert result.matched == 1
    assert torch.allclose(gm(X, ROWS), wanted, atol=1e-6)
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    text = str(gm.graph)
    assert GatherLogitsRows().run(gm).matched == 0
    assert str(gm.graph) == text
    return gm


def test_rows_are_gathered_right_behind_the_last_op_across_tokens(lab):
    gm = run(lab, Tail())
    assert sorted(gathered_inputs(gm)) == ["cumsum", "x"]
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "logits_rows"]


def test_scaled_and_capped_logits_are_row_wise_too(lab):
    gm = run(lab, Tail(lambda logits: torch.tanh(logits / 30) * 30))
    assert sorted(gathered_inputs(gm)) == ["cumsum", "x"]


def test_shapes_behind_the_gather_follow(lab):
    gm = run(lab, Tail())
    rows = next(n for n in gm.graph.nodes if n.name == "logits_rows").meta["val"].shape[0]
    (out,) = gm.graph.output_node().args
    assert out.meta["val"].shape[1] == rows
    assert str(out.meta["val"].shape[1]) != str(X.shape[1])


def test_one_gather_where_two_would_save_nothing(lab):
    class Sum(Tail):
        def forward(self, x):
            return self.head(self.norm(x.cumsum(1) + x.cumprod(1)))

    assert gathered_inputs(run(lab, Sum())) == ["add"]


def test_what_others_still_read_is_not_narrowed(lab):
    class Both(Tail):
        def forward(self, x):
            x = self.mix(x)
            return self.head(self.norm(x)) + x.cumsum(1).sum(-1, keepdim=True)

    gm = run(lab, Both())
    assert set(gathered_inputs(gm)) == {"linear", "sum_1"}


def test_rows_behind_an_unknown_op_are_still_gathered_with_a_note(lab):
    gm = lab.export(Tail(lambda logits: logits.flip(1)), X, dynamic=1)
    wanted = gm(X)[:, ROWS]
    result = GatherLogitsRows().run(gm)
    assert result.matched == 1
    assert "not known to work row by row" in result.skipped[0].reason
    assert torch.equal(gm(X, ROWS), wanted)


@pytest.mark.parametrize(
    ("finish", "reason"),
    [(lambda y: y.transpose(1, 2), "not [1, tokens"), (lambda y: (y, y + 1), "2 outputs")],
)
def test_outputs_that_are_no_logits_are_an_error(lab, finish, reason):
    gm = lab.export(Tail(finish), X, dynamic=1)
    with pytest.raises(PassError) as error:
        PassManager([GatherLogitsRows()]).run(gm)
    assert reason in error.value.message


def test_a_graph_of_fixed_length_gathers_too(lab):
    gm = lab.export(Tail(), X)
    wanted = gm(X)[:, ROWS]
    assert GatherLogitsRows().run(gm).matched == 1
    assert torch.allclose(gm(X, ROWS), wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("llama", 2), ("gpt2", 2), ("gemma2", 2), ("mixtral", 1)])
def test_decoders_gather_behind_their_last_attention(lab, name, expected):
    """Attention output and residual; behind routed experts, which are left whole, only their sum."""
    model = lab.family(name)
    PassManager([*canonical_passes(), GatherLogitsRows()]).run(model.graph)
    assert len(gathered_inputs(model.graph)) == expected
