"""linear_affine on prepared scales: every Triton road against the reference, that against the format.

Interpreted, or compiled on a CUDA device. Inputs lie inside larger buffers
full of NaN, so that a read past an edge that reaches the result shows.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from test_linear_affine_triton import DEVICE, ON_GPU, assert_close, poisoned, problem

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import BITS
from qcompiler.kernels.ops.linear_affine_sides import (
    linear_affine_sides_reference,
    pack_sides,
    sides_per_block,
)
from qcompiler.kernels.providers import select_provider
from qcompiler.kernels.triton.linear.affine import linear_affine_triton
from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton
from qcompiler.kernels.tuning.tables import LinearConfig

on_modes = pytest.mark.parametrize("mode", ON_GPU)
QUADS = LinearConfig("quads", 4, 4, 1, 1, 1)
DOTS = LinearConfig("dots", 32, 8, 1, 1, 2)
GEMM = LinearConfig("gemm", 64, 16, 1, 4, 2)
WIDE = LinearConfig("wide", 64, 16, 1, 4, 2)
DENSE = LinearConfig("dense")
ROADS = pytest.mark.parametrize("config", [QUADS, DOTS, GEMM, WIDE, DENSE], ids=lambda config: config.kind)
# The interpreter is slow: it sees fewer shapes.
GROUP_SIZES = [0, 16, 32, 64, 128, 256] if DEVICE.type == "cuda" else [0, 16, 128]
RAGGED = [(2, 1000), (4, 1100), (3, 512), (8, 330)] if DEVICE.type == "cuda" else [(4, 500), (3, 320)]
# bfloat16 arithmetic is wrong in the interpreter of triton 3.6.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]


def prepared(bits, group_size, n, k, m, dtype, *, bias=True):
    """Arguments with sides instead of scales and zeros, the canonical op's result, and its size."""
    (x, low, high, scales, zeros, offset, *rest), wanted, size = problem(
        bits, group_size, n, k, m, dtype, bias=bias
    )
    sides = poisoned(pack_sides(scales, zeros, bits, group_size, k, dtype).cpu())
    return (x, low, high, sides, offset, *rest), wanted, size


@on_modes
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ROADS
def test_every_bit_width_and_dtype(mode, bits, config, dtype):
    arguments, wanted, size = prepared(bits, 64, 37, 512, 3, dtype)
    assert_close(linear_affine_sides_triton(*arguments, config=config), wanted, size)


@on_modes
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("bits", "k"), RAGGED)
@ROADS
def test_every_group_size_on_ragged_widths(mode, bits, group_size, k, config):
    arguments, wanted, size = prepared(bits, group_size, 19, k, 2, torch.float16)
    assert_close(linear_affine_sides_triton(*arguments, config=config), wanted, size)


@on_modes
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM, WIDE], ids=lambda config: config.kind)
@pytest.mark.parametrize("split", [2, 3, 8])
def test_split_k_gives_the_same_sum_every_time(mode, config, split):
    arguments, wanted, size = prepared(4, 64, 20, 2048, 2, torch.float16)
    config = LinearConfig(config.kind, config.block_n, config.block_m, split, config.num_warps, 2)
    first = linear_affine_sides_triton(*arguments, config=config)
    assert_close(first, wanted, size)
    assert torch.equal(first, linear_affine_sides_triton(*arguments, config=config))


@on_modes
@pytest.mark.parametrize(("bits", "bias"), [(4, True), (3, True), (4, False)])
@pytest.mark.parametrize("slices", [2, 3, 40])
def test_a_dense_weight_in_slices_gives_the_same_product(mode, bits, bias, slices, monkeypatch):
    arguments, wanted, size = prepared(bits, 64, 37, 512, 5, torch.float16, bias=bias)
    new_empty = torch.Tensor.new_empty

    def nan_filled(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    y = linear_affine_sides_triton(*arguments, config=LinearConfig("dense", split_k=slices))
    assert_close(y, wanted, size)


@on_modes
@pytest.mark.parametrize("tokens", [1, 2, 5, 70, 600])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chosen_road_for_any_number_of_tokens(mode, tokens, bias):
    arguments, wanted, size = prepared(4, 64, 70, 256, tokens, DTYPES[-1], bias=bias)
    assert_close(linear_affine_sides_triton(*arguments), wanted, size)


@on_modes
@pytest.mark.parametrize(("k", "skip"), [(1001, 0), (1024, 1)])
def test_rows_that_are_no_pairs_take_another_road(mode, k, skip):
    arguments, wanted, size = prepared(4, 64, 24, k, 2, torch.float16)
    wide = torch.full((2, k + skip), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:, skip:] = arguments[0]
    y = linear_affine_sides_triton(wide[:, skip:], *arguments[1:], config=QUADS)
    assert_close(y, wanted, size)


@on_modes
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM, WIDE], ids=lambda config: config.kind)
def test_outputs_are_written_everywhere(mode, config, monkeypatch):
    arguments, wanted, size = prepared(4, 64, 37, 2048, 3, torch.float16)
    filled = []
    new_empty = torch.Tensor.new_empty

    def nan_filled(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        if made.is_floating_point() and made.numel():
            filled.append(made.fill_(float("nan")).shape)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    split = LinearConfig(config.kind, config.block_n, config.block_m, 2, config.num_warps, 2)
    y = linear_affine_sides_triton(*arguments, config=split)
    monkeypatch.undo()
    assert {(3, 37), (2, 3, 37)} <= set(map(tuple, filled))
    assert_close(y, wanted, size)


@on_modes
@pytest.mark.parametrize("config", [QUADS, DOTS, GEMM, WIDE], ids=lambda config: config.kind)
def test_the_op_on_the_formats_own_scales_takes_the_same_roads(mode, config):
    plain, _, _ = problem(4, 64, 37, 512, 3, DTYPES[0])
    arguments, _, _ = prepared(4, 64, 37, 512, 3, DTYPES[0])
    wanted = linear_affine_sides_triton(*arguments, config=config)
    assert torch.equal(linear_affine_triton(*plain, config=config), wanted)


@on_modes
@pytest.mark.parametrize("tokens", [1, 16])
def test_cuda_graph_replays(mode, tokens):
    if mode != "compiled":
        pytest.skip("graphs are a CUDA thing")
    arguments, wanted, size = prepared(4, 64, 64, 4096, tokens, torch.bfloat16)
    op = torch.ops.qcompiler.linear_affine_sides.default
    op(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(*arguments)
    y.fill_(float("nan"))
    graph.replay()
    assert_close(y, wanted, size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "k"), [(64, 320), (16, 100), (0, 77), (256, 1000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_computes_what_the_format_says(bits, group_size, k, dtype):
    arguments, wanted, size = prepared(bits, group_size, 12, k, 3, dtype)
    assert_close(linear_affine_sides_reference(*arguments), wanted, size)


def test_opcheck():
    arguments, _, _ = prepared(3, 64, 8, 128, 2, torch.bfloat16)
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.qcompiler.linear_affine_sides.default, on_cpu)


def test_what_does_not_fit_is_refused():
    (x, low, high, sides, bias, *rest), _, _ = prepared(4, 64, 8, 256, 2, torch.float16)
    for wrong in ((x.float(), low, high, sides), (x, low[:, 1:], high, sides), (x, low, high, sides[:, 1:])):
        with pytest.raises(InvalidInputError):
            linear_affine_sides_reference(*wrong, bias, *rest)
    with pytest.raises(InvalidInputError, match="not finite"):
        pack_sides(torch.full((4, 8), 6e4), torch.full((4, 8), 200.0), 4, 64, 256, torch.float16)


@pytest.mark.parametrize(("dtype", "k", "name"), [
    (torch.bfloat16, 4096, "sides"), (torch.float32, 4096, "canonical"), (torch.float16, 77, "canonical"),
])  # fmt: skip
def test_a_gpu_takes_prepared_scales_where_they_pay(dtype, k, name):
    (_, low, high, _, _, *rest), _, _ = prepared(3, 64, 8, k, 1, torch.float16)
    attrs = dict(zip(("bits", "group_size", "in_features"), rest, strict=True))
    provider = select_provider("linear_affine", attrs, {"low": low, "high": high}, "cuda", dtype)
    assert provider.name == name


@pytest.mark.parametrize(
    ("bits", "group_size", "count"), [(4, 64, 4), (4, 256, 1), (2, 16, 8), (8, 64, 2), (4, 0, 1)]
)
def test_how_many_groups_a_block_covers(bits, group_size, count):
    assert sides_per_block(bits, group_size, 4096) == count
