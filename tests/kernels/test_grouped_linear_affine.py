"""`grouped_linear_affine`: every row meets its own expert's dequantized weight."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, on_triton_wide, poisoned
from experts_case import (
    EXPERTS,
    OFFSETS,
    OUTPUTS,
    ROWS,
    assert_close,
    each_row_by_itself,
    give_outputs,
    on_device,
)

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import BITS, num_groups
from qcompiler.kernels.providers import select_provider

OP = torch.ops.qcompiler.grouped_linear_affine.default


def stored(spec, inputs, seed=0):
    """Tensors of random experts as one matrix [EXPERTS·OUTPUTS, inputs]."""
    g = torch.Generator().manual_seed(seed)
    rows, groups = EXPERTS * OUTPUTS, num_groups(spec.group_size, inputs)
    codes = torch.randint(0, 2**spec.bits, (rows, inputs), dtype=torch.uint8, generator=g)
    scales = (torch.rand(rows, groups, generator=g) + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(rows, groups, generator=g)
    return AFFINE.pack(spec, codes, scales, zeros)


def case(bits, group_size, inputs, name, *, dtype=torch.float32, bias=True):
    """Arguments of the op, what each row gives by itself in float64, and |x|·|w| of each element."""
    spec = AffineSpec(bits, group_size)
    tensors = stored(spec, inputs)
    g = torch.Generator().manual_seed(inputs)
    x = torch.randn(ROWS, inputs, generator=g).to(dtype)
    added = torch.randn(EXPERTS, OUTPUTS, generator=g).to(dtype) if bias else None
    dense = AFFINE.dequantize(spec, tensors, inputs, torch.float64)
    wanted, size = each_row_by_itself(x, dense, added, OFFSETS[name])
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    op, arguments = AFFINE.grouped_op_call(spec, x, tensors, offsets, added, inputs)
    assert op is OP
    return arguments, wanted, size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OFFSETS)
def test_reference_gives_each_row_its_expert(name, bits, dtype):
    arguments, wanted, size = case(bits, 32, 70, name, dtype=dtype)
    y = OP(*arguments)
    assert y.dtype == dtype
    assert_close(y, wanted, size)


@pytest.mark.parametrize("bits", [3, 4])
def test_opcheck(bits):
    arguments, _, _ = case(bits, 32, 70, "ragged", bias=bits == 4)
    torch.library.opcheck(OP, arguments)


def test_an_expert_stands_alone_in_the_stored_rows():
    """Laying the experts' own tensors side by side gives the tensors of the whole."""
    spec = AffineSpec(3, 32)
    whole = stored(spec, 64)
    codes, scales, zeros = AFFINE.unpack(spec, whole, 64)
    own = [slice(e * OUTPUTS, (e + 1) * OUTPUTS) for e in range(EXPERTS)]
    joined = AFFINE.concat(spec, [AFFINE.pack(spec, codes[o], scales[o], zeros[o]) for o in own])
    assert all(torch.equal(joined[part], whole[part]) for part in whole)


def test_arguments_that_do_not_fit_are_refused_by_name():
    arguments, _, _ = case(4, 32, 70, "all")
    x, low, high, scales, zeros, offsets, bias, *rest = arguments
    for given, told in (
        ((x[:, 1:], low, high, scales, zeros, offsets, bias), "rows of 70 features"),
        ((x, low, high, scales, zeros, offsets[:4], bias), "165 stored rows among experts"),
        ((x, low, high, scales, zeros, offsets, bias[:, 1:]), "bias is"),
        ((x, low, high, scales, zeros[:, 1:], offsets, bias), "zeros are"),
        ((x, low[:, 1:], high, scales, zeros, offsets, bias), "low is"),
    ):
        with pytest.raises(InvalidInputError, match=told):
            OP(*given, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_provider_multiplies_with_the_dense_weight(dtype):
    arguments, wanted, size = case(4, 32, 70, "ragged", dtype=dtype)
    names = [a.name for a in OP._schema.arguments]
    given = dict(zip(names, arguments, strict=True))
    x, attributes = (
        given.pop("x"),
        {n: given.pop(n) for n in ("bits", "group_size", "in_features", "offsets")},
    )
    provider = select_provider("grouped_linear_affine", attributes, given, "cpu", dtype)
    assert provider.name == "cpu-dense"
    tensors, settings = provider.prepare(given, attributes)
    assert tensors["weight"].shape == (EXPERTS, OUTPUTS, 70)
    y = provider.op(*provider.bind(x, tensors, settings))
    # the dense weight is rounded to x's dtype once more
    assert_close(y, wanted, 2 * size)
    assert select_provider("grouped_linear_affine", attributes, given, "cpu", dtype, lean=True).op is OP


@on_triton
@pytest.mark.parametrize("bits", BITS)
def test_kernel_at_every_width(bits, target):
    from qcompiler.kernels.triton.grouped.affine import grouped_linear_affine_triton

    arguments, wanted, size = case(bits, 64, 320, "ragged", dtype=target[1])
    y = grouped_linear_affine_triton(*on_device(target, arguments))
    assert y.dtype == target[1]
    assert_close(y, wanted, size)


@on_triton_wide
@pytest.mark.parametrize("group_size", [0, 16, 32, 128])
@pytest.mark.parametrize(("bits", "inputs"), [(4, 256), (3, 77), (8, 31)])
def test_kernel_on_ragged_widths(bits, inputs, group_size, target):
    from qcompiler.kernels.triton.grouped.affine import grouped_linear_affine_triton

    arguments, wanted, size = case(bits, group_size, inputs, "ragged", dtype=target[1], bias=False)
    assert_close(grouped_linear_affine_triton(*on_device(target, arguments)), wanted, size)


@on_triton_wide
@pytest.mark.parametrize("name", OFFSETS)
def test_kernel_with_empty_experts_and_rows_of_none(name, target, monkeypatch):
    from qcompiler.kernels.triton.grouped.affine import grouped_linear_affine_triton

    arguments, wanted, size = case(4, 32, 64, name, dtype=target[1])
    arguments = on_device(target, arguments)
    arguments[0] = poisoned(arguments[0])
    filled = give_outputs(monkeypatch, lambda made: made.fill_(torch.nan))
    assert_close(grouped_linear_affine_triton(*arguments), wanted, size)
    assert filled == [(ROWS, OUTPUTS)]


@on_triton_wide
@pytest.mark.parametrize("ends", [(-3, 10, 200, 300, 400), (30, 20, 10, 5, 40)])
def test_kernel_stays_inside_x_for_any_offsets(ends, target, monkeypatch):
    """A damaged graph may compute senseless offsets: results are then senseless too, accesses are not."""
    from qcompiler.kernels.triton.grouped.affine import grouped_linear_affine_triton

    arguments, _, _ = case(4, 32, 64, "all", dtype=target[1])
    arguments = on_device(target, arguments)
    arguments[5] = torch.tensor(ends, dtype=torch.int32, device=target[0])
    buffer = torch.full((ROWS + 400, OUTPUTS), 7.0, dtype=target[1], device=target[0])
    give_outputs(monkeypatch, lambda _: buffer[200 : 200 + ROWS])
    grouped_linear_affine_triton(*arguments)
    assert bool((buffer[:200] == 7).all())
    assert bool((buffer[200 + ROWS :] == 7).all())


@pytest.mark.parametrize(("rows", "experts", "smallest"), [(8, 8, 16), (4096, 8, 128), (512, 8, 64)])
def test_tile_follows_the_rows_an_expert_gets(rows, experts, smallest):
    from qcompiler.kernels.triton.grouped.expert_rows import expert_tile

    assert expert_tile(rows, experts, 2)[1] == smallest
