"""QuantizeEmbeddings: tables are gathered from stored codes, and tied heads read the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.errors import PassError
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes import PassManager, QuantizeEmbeddings, QuantizeLinears

GATHER, LINEAR = "qcompiler.embedding_affine.default", "qcompiler.linear_affine.default"
SPEC = AffineSpec(8, 32)
IDS = torch.arange(12).view(1, 12)


def round_to_nearest(name, weight, spec):
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, spec.group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**spec.bits - 1)).clamp(min=1e-6)
    zeros = -low / scales
    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 2**spec.bits - 1)
    return get_format("affine").pack(spec, codes.view(rows, columns).to(torch.uint8), scales, zeros)


class Net(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 64)
        self.positions = nn.Embedding(16, 64)
        self.head = nn.Linear(64, 96, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids):
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.head(self.embed(input_ids) + self.positions(places))


def names(gm):
    return {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}


def test_a_tied_head_reads_the_tensors_of_the_embedding(lab):
    gm = lab.export(Net(), IDS, dynamic=1)
    result, difference = lab.check_run(
        QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest), gm, IDS, matched=2
    )
    assert 0 < difference < 0.02
    assert (lab.ops(gm)[GATHER], lab.ops(gm)[LINEAR]) == (1, 1)
    assert names(gm) & {"embed.low", "embed.scales", "embed.zeros", "head.low"} == {
        "embed.low", "embed.scales", "embed.zeros",
    }  # fmt: skip
    assert not {"embed.weight", "head.weight"} & names(gm)
    (table,) = result.quantized
    assert (table.name, table.kind, table.shared_with) == ("embed", "embedding", ("head",))
    assert (table.out_features, table.in_features) == (96, 64)
    assert ("positions", "not looked up by input_ids") in result.skipped


def test_values_are_those_of_the_dequantized_table(lab):
    net = Net()
    gm = lab.export(net, IDS)
    QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest).run(gm)
    dense = get_format("affine").dequantize(
        SPEC, round_to_nearest("", net.embed.weight.detach(), SPEC), 64, torch.float32
    )
    net.embed.weight.data = dense
    assert lab.difference(gm(IDS), net(IDS)) < 1e-6


def test_an_untied_head_is_left_to_the_linears(lab):
    gm = lab.export(Net(tied=False), IDS)
    result = QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest).run(gm)
    assert result.matched == 1
    assert result.quantized[0].shared_with == ()
    assert "head.weight" in names(gm)
    assert QuantizeLinears(lambda *_: SPEC, round_to_nearest).run(gm).matched == 1
    assert {"embed.low", "head.low"} <= names(gm)


def test_a_head_may_keep_the_float_table(lab):
    gm = lab.export(Net(), IDS)
    share = {"head": "--skip head"}.get
    result = QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest, share).run(gm)
    assert ("head", "--skip head") in result.skipped
    assert lab.ops(gm)["aten.linear.default"] == 1
    assert lab.ops(gm)[GATHER] == 1
    assert any(name.endswith("weight") and "positions" not in name for name in names(gm))


def test_every_table_counts_where_no_input_is_named(lab):
    gm = lab.export(Net(), IDS)
    result = QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest, inputs=None).run(gm)
    assert [table.name for table in result.quantized] == ["embed", "positions"]


def test_reasons_and_nothing_to_do(lab):
    class Odd(Net):
        def forward(self, input_ids):
            return super().forward(input_ids) + self.embed.weight.sum()

    gm = lab.export(Odd(), IDS)
    result = QuantizeEmbeddings(lambda *_: SPEC, round_to_nearest).run(gm)
    assert dict(result.skipped)["embed"].startswith("its table is also read by")
    with pytest.raises(PassError, match=r"quantize_embeddings: matched nothing.*kept"):
        PassManager([QuantizeEmbeddings(lambda *_: "kept")]).run(lab.export(Net(), IDS))
