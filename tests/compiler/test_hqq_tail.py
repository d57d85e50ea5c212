"""hqq with a tail: what the tail takes from the body's error, what it costs, and the whole road."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import qcompiler
from qcompiler.cli.main import qcompile, run
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, BODY_TAIL, AffineSpec, BodyTailSpec
from qcompiler.kernels.formats.body_tail import decode_tail, tail_layout
from qcompiler.methods.base import get_method
from qcompiler.methods.body_tail import FRACTIONS, choose_fraction
from qcompiler.options import CompileOptions
from qcompiler.plan import make_plan
from qcompiler.runtime.artifact import open_artifact
from qcompiler.sizes import Sizes

HQQ = get_method("hqq")


def heavy(rows: int = 48, columns: int = 512, part: float = 0.004) -> torch.Tensor:
    """Normal weights, a few of them ten times as large."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < part, 10 * weight, weight)


def round_trip(weight, bits, group_size=64, **options):
    spec = HQQ.resolve_spec(bits, group_size, options)
    format_ = BODY_TAIL if isinstance(spec, BodyTailSpec) else AFFINE
    tensors = HQQ.quantize(weight, spec, options)
    restored = format_.dequantize(spec, tensors, weight.shape[1], torch.float32)
    return restored, format_.bits_per_weight(spec, *weight.shape), tensors


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.65), (3, 0.5), (4, 0.6)])
def test_a_tail_takes_outliers_out_of_the_body(bits, ratio):
    weight = heavy()
    plain, plain_bits, _ = round_trip(weight, bits)
    tailed, tail_bits, _ = round_trip(weight, bits, tail_fraction="0.005")
    assert tail_bits < plain_bits + 0.15
    assert (tailed - weight).square().sum() < ratio * (plain - weight).square().sum()


@pytest.mark.parametrize(("group_size", "columns"), [(64, 200), (0, 200), (16, 8), (128, 512)])
def test_the_tail_holds_the_largest_weights_wherever_groups_end(group_size, columns):
    weight = heavy(columns=columns, part=0.0)
    spec = HQQ.resolve_spec(3, group_size, {"tail_fraction": "0.01"})
    _, _, block = tail_layout(spec, columns)
    weight[5, columns - 1] = -1.0
    weight[7, 0] = 0.5
    tensors = HQQ.quantize(weight, spec, {"tail_fraction": "0.01"})
    found, values = decode_tail(tensors["tail"], tensors["tail_scales"], spec, columns)
    assert columns - 1 in found[values[:, 5] != 0, 5]
    assert 0 in found[values[:, 7] != 0, 7]
    restored = BODY_TAIL.dequantize(spec, tensors, columns, torch.float32)
    assert restored[5, columns - 1] == pytest.approx(-1.0, abs=0.03)
    assert restored[7, 0] == pytest.approx(0.5, abs=0.02)
    assert block <= 256


def test_the_body_is_solved_without_the_tail():
    """Where one weight stretches a group, the others come out as if it were not there."""
    weight = heavy(part=0.0)
    spec = HQQ.resolve_spec(3, 64, {"tail_fraction": "0.004"})
    stretched = weight.clone()
    stretched[:, 100] = 1.0
    plain, tailed = (
        BODY_TAIL.dequantize(spec, HQQ.quantize(w, spec), 512, torch.float32) for w in (weight, stretched)
    )
    others = torch.arange(64, 128) != 100
    errors = [
        (restored[:, 64:128] - weight[:, 64:128])[:, others].square().sum() for restored in (plain, tailed)
    ]
    assert errors[1] < 1.3 * errors[0]


def test_zero_and_constant_groups_stay_exact():
    weight = heavy()
    weight[3] = 0
    weight[5, 64:128] = 0.25
    restored, _, _ = round_trip(weight, 2, tail_fraction="0.02")
    assert torch.equal(restored[3], weight[3])
    assert torch.equal(restored[5, 64:128], weight[5, 64:128])


def test_the_result_does_not_depend_on_the_chunks():
    from qcompiler.methods.body_tail import quantize_body_tail

    weight, options = heavy(columns=200), HQQ.validate({"tail_fraction": "0.02"})
    spec = HQQ.resolve_spec(3, None, options)
    whole, parts = (quantize_body_tail(HQQ, weight, spec, options, chunk_weights=n) for n in (1 << 30, 1000))
    assert all(torch.equal(whole[part], parts[part]) for part in whole)


def test_options_and_what_they_stand_for():
    assert HQQ.resolve_spec(3) == AffineSpec(3, 64)
    assert HQQ.resolve_spec(3, 32, {"tail_fraction": 0.01, "tail_bits": 6}) == BodyTailSpec(3, 32, 0.01, 6)
    for wrong in ("half", "0.5", "-0.1", "nan"):
        with pytest.raises(InvalidInputError, match="tail fraction"):
            HQQ.validate({"tail_fraction": wrong})
    with pytest.raises(InvalidInputError, match="published solver"):
        HQQ.validate({"tail_fraction": "0.01", "solver": "reference"})
    with pytest.raises(InvalidInputError, match="tail_bits"):
        HQQ.validate({"tail_bits": 9})


def test_auto_takes_more_of_a_heavier_tail():
    options = HQQ.validate({"tail_fraction": "auto"})
    spec = HQQ.resolve_spec(3, None, options)
    light, heavier = (choose_fraction(HQQ, [heavy(32, 1024, part)], spec, options) for part in (0.0, 0.015))
    assert light == FRACTIONS[0]
    assert heavier >= 0.012


def test_the_plan_settles_auto_and_accounts_for_every_byte(tiny_llama):
    options = CompileOptions(
        str(tiny_llama), bits=2, method_options={"tail_fraction": "auto"}, embedding_bits=8, device="cpu"
    )
    plan = make_plan(options)
    fraction = float(plan.method_options["tail_fraction"])
    assert fraction in FRACTIONS
    assert {layer.spec for layer in plan.linears} == {BodyTailSpec(2, 64, fraction)}
    # The table is gathered from, which body_tail has no op for.
    assert {layer.spec for layer in plan.embeddings} == {AffineSpec(8, 64)}
    layer = plan.linears[0]
    assert Sizes.layer_bits(layer) == BODY_TAIL.bits_per_weight(
        layer.spec, layer.out_features, layer.in_features
    )


FLAGS = ["--bits", "3", "--tail-fraction", "0.01", "--dtype", "float32", "--eval-tokens", "0", "-q"]


def test_an_artifact_with_a_tail_answers_like_its_dequantized_weights(random_llama, tmp_path):
    out = tmp_path / "artifact"
    assert run(qcompile, [str(random_llama), "-o", str(out), *FLAGS, "--tail-bits", "6"]) == 0
    report = json.loads((out / "report.json").read_text())
    opened = open_artifact(out)
    stored = {name: entry for entry in opened.manifest.layers for name in entry.tensors.values()}
    weights = sum(entry.out_features * entry.in_features for entry in opened.manifest.layers)
    entries = opened.tensors.entries
    size = sum(torch.Size(entries[n].shape).numel() * entries[n].dtype.itemsize for n in stored)
    assert report["bits_per_weight_linears"] == pytest.approx(8 * size / weights)
    assert {entry.spec["tail_bits"] for entry in opened.manifest.layers} == {6}
    model = qcompiler.load(out, device="cpu")
    assert (
        len(model.generate_tokens([[5, 6, 7]], max_tokens=4, temperature=0, ignore_eos=True)[0].token_ids)
        == 4
    )


def test_a_killed_run_resumes_to_the_same_bytes(random_llama, tmp_path):
    unbroken, killed = tmp_path / "a" / "same", tmp_path / "b" / "same"
    flags = [*FLAGS[:3], "auto", *FLAGS[4:]]
    assert run(qcompile, [str(random_llama), "-o", str(unbroken), *flags]) == 0
    lines = [
        "import os, signal",
        "from qcompiler.methods.hqq import HQQ",
        "original, calls = HQQ.quantize, 0",
        "def quantize(*args, **kwargs):",
        "    global calls",
        "    calls += 1",
        f"    if calls == 6: os.kill(os.getpid(), {int(signal.SIGKILL)})",
        "    return original(*args, **kwargs)",
        "HQQ.quantize = quantize",
        "from qcompiler.cli.main import main",
        f"main({[str(random_llama), '-o', str(killed), *flags]!r})",
    ]
    died = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, timeout=300, env=os.environ
    )
    assert died.returncode == -9
    assert run(qcompile, [str(random_llama), "-o", str(killed), *flags, "--resume"]) == 0
    first, second = ({p.name: p.read_bytes() for p in out.iterdir()} for out in (unbroken, killed))
    assert first == second
