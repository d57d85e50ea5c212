"""SelectKernels: the op and the repacked tensors that fit a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.base import get_format
from qcompiler.kernels.formats.body_tail import BodyTailSpec
from qcompiler.passes import QuantizeLinears, SelectKernels

AFFINE = "qcompiler.linear_affine.default"


def random_codes(name, weight, spec):
    """Random codes with scales and zeros that bfloat16 holds exactly."""
    rows, columns = weight.shape
    groups = columns // spec.group_size if spec.group_size else 1
    codes = torch.randint(0, 2**spec.bits, (rows, columns), dtype=torch.uint8)
    middle = torch.full((rows, groups), float(2 ** (spec.bits - 1)))
    return get_format("affine").pack(spec, codes, torch.full((rows, groups), 2.0**-6), middle)


def quantized(lab, spec, x):
    gm = lab.export(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False)).to(x.dtype), x)
    QuantizeLinears(lambda *_: spec, random_codes).run(gm)
    return gm


@pytest.mark.parametrize(
    ("spec", "op"),
    [
        (AffineSpec(4, 32), "qcompiler.linear_affine_cpu_int4.default"),
        (AffineSpec(8, 0), "qcompiler.linear_affine_cpu_int8.default"),
        (AffineSpec(8, 32), "qcompiler.linear_affine_cpu_dense.default"),
    ],
)
def test_a_cpu_gets_torchs_own_low_bit_ops(lab, spec, op):
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    gm = quantized(lab, spec, x)
    _, difference = lab.check_run(SelectKernels("cpu"), gm, x, matched=2)
    assert lab.ops(gm)[op] == 2
    assert AFFINE not in lab.ops(gm)
    assert difference <= 2**-6  # two roundings to bfloat16 in another order
    names = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    assert not any(name.endswith(("low", "high")) for name in names)
    assert "0.bias" in names  # kept under its own name


def test_a_cpu_makes_body_and_tail_dense(lab):
    spec = BodyTailSpec(3, 32, 0.02)

    def pack(name, weight, spec):
        body = random_codes(name, weight, spec.body)
        chosen = torch.zeros(weight.shape, dtype=torch.bool)
        chosen[:, 7] = True
        return get_format("body_tail").pack(spec, body, weight, chosen)

    x = torch.randn(3, 64)
    gm = lab.export(nn.Linear(64, 96), x)
    QuantizeLinears(lambda *_: spec, pack).run(gm)
    _, difference = lab.check_run(SelectKernels("cpu"), gm, x, matched=1)
    assert lab.ops(gm)["qcompiler.linear_affine_cpu_dense.default"] == 1
    assert difference <= 1e-5


def test_where_the_canonical_op_is_best_it_stays(lab):
    x = torch.randn(3, 64)  # float32, which a GPU's other kernels would round
    gm = quantized(lab, AffineSpec(4, 32), x)
    result, _ = lab.check_run(SelectKernels("cuda"), gm, x, matched=0)
    assert ["canonical op is the best" in skip.reason for skip in result.skipped] == [True] * 2


def test_weights_on_meta_are_left_to_the_loader(lab):
    model = lab.family("llama")
    QuantizeLinears(lambda *_: AffineSpec(4, 32)).run(model.graph)
    result = SelectKernels("cpu").run(model.graph)
    assert result.matched == 0
    assert all("on meta" in skip.reason for skip in result.skipped)
    assert len(result.skipped) == 15
