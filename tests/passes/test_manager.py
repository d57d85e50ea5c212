"""PassManager: order, counts, dumps, and passes that must match."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.errors import InvalidInputError, PassError
from qcompiler.passes import (
    API_VERSION,
    FuseGatedActivation,
    FuseRMSNorm,
    Pass,
    PassManager,
    PassResult,
    canonical_passes,
    graph_text,
    lowering_passes,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return nn.functional.silu(self.gate(x)) * self.up(x)


X = torch.randn(1, 4, 8)


def test_passes_run_in_order_and_report(lab):
    gm = lab.export(Block(), X)
    wanted = gm(X)
    results = PassManager([FuseRMSNorm(), FuseGatedActivation()]).run(gm)
    assert [(r.name, r.matched) for r in results] == [("fuse_rms_norm", 1), ("fuse_gated_activation", 1)]
    assert all(r.seconds > 0 for r in results)
    assert results[0].nodes_after == results[1].nodes_before
    assert results[1].nodes_before - results[1].nodes_after == 1
    assert torch.allclose(gm(X), wanted, atol=1e-6)


def test_graphs_are_dumped_before_and_after(lab, tmp_path):
    gm = lab.export(Block(), X)
    PassManager([FuseRMSNorm(), FuseGatedActivation()], tmp_path / "graphs").run(gm)
    files = sorted((tmp_path / "graphs").iterdir())
    assert [f.name for f in files] == [
        "000_captured.txt",
        "001_fuse_rms_norm.txt",
        "002_fuse_gated_activation.txt",
    ]
    before, after = files[0].read_text(), files[1].read_text()
    assert "aten.rms_norm" in before
    assert "aten.rms_norm" not in after
    assert "qcompiler.rms_norm.default(%x, %norm_weight, 1e-06, 0.0, False)" in after
    assert "# fuse_rms_norm: 1 matched" in after
    assert "float32[1, 4, 8]" in after


def test_dumps_are_the_same_each_time(lab):
    first, second = (lab.export(Block(), X) for _ in range(2))
    PassManager(canonical_passes()).run(first)
    PassManager(canonical_passes()).run(second)
    assert graph_text(first) == graph_text(second)


class Demanded(FuseRMSNorm):
    required = True


def test_a_required_pass_that_matches_nothing_is_an_error(lab):
    gm = lab.export(nn.Linear(8, 8), X)
    with pytest.raises(
        PassError, match=r"fuse_rms_norm: matched nothing in this graph .nothing resembling"
    ) as error:
        PassManager([Demanded()]).run(gm)
    assert error.value.exit_code == 1
    assert error.value.hint


def test_the_error_says_what_came_close(lab):
    gm = lab.export(nn.RMSNorm((4, 8)), X)
    with pytest.raises(PassError, match="not the last dimension"):
        PassManager([Demanded()]).run(gm)


def test_a_pass_that_breaks_the_graph_is_named(lab):
    class Breaks(Pass):
        name = "breaks"

        def apply(self, gm, result: PassResult) -> None:
            first, *_, last = (n for n in gm.graph.nodes if n.op == "call_function")
            first.args = (last,)
            result.matched = 1

    gm = lab.export(Block(), X)
    with pytest.raises(PassError, match="breaks: the rewritten graph does not lint"):
        PassManager([Breaks()]).run(gm)


def test_a_graph_without_values_is_refused():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(PassError, match="meta"):
        PassManager(lowering_passes()).run(torch.fx.symbolic_trace(_Plain()))
    assert PassManager([FuseRMSNorm()]).run(gm)[0].matched == 0


class _Plain(nn.Module):
    def forward(self, x):
        return x + 1


def test_the_lists_are_explicit():
    names = [item.name for item in canonical_passes()]
    assert names.index("fuse_layer_norm") < names.index("fuse_rms_norm")
    assert [item.name for item in lowering_passes("decoder")][-4:] == [
        "gather_logits_rows",
        "insert_paged_kv_cache",
        "fuse_rotary_append",
        "fuse_gated_linears",
    ]
    assert [item.name for item in lowering_passes("encoder")][-2:] == ["insert_ragged", "fuse_gated_linears"]
    unfused = [item.name for item in lowering_passes(fuse=False)]
    assert unfused == ["gather_logits_rows", "insert_paged_kv_cache"]
    assert not any(item.changes_numerics for item in (*canonical_passes(), *lowering_passes()))


@pytest.mark.parametrize("api", [(0, 9), (2, 0), (API_VERSION[0], API_VERSION[1] + 1)])
def test_a_pass_for_another_version_is_refused(api):
    class Foreign(FuseRMSNorm):
        pass

    Foreign.api = API_VERSION
    PassManager([Foreign()])
    Foreign.api = api
    with pytest.raises(InvalidInputError, match=f"written for qcompiler.passes {api[0]}.{api[1]}"):
        PassManager([Foreign()])


def test_what_is_no_graph_is_refused():
    program = torch.export.export(_Plain(), (torch.ones(3),))
    with pytest.raises(InvalidInputError, match=r"program.module\(\)"):
        PassManager(canonical_passes()).run(program)
    assert PassManager(canonical_passes()).run(program.module())[0].matched == 0
