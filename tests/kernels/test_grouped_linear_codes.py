"""`grouped_linear_lut4` and `grouped_linear_int8`: every row meets its own expert's dequantized weight."""

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
from qcompiler.kernels.formats import (
    INT8_CHANNEL,
    LUT4,
    Int8ChannelSpec,
    Lut4Spec,
    expert_tensor_specs,
)
from qcompiler.kernels.formats.calls import stored_weight
from qcompiler.kernels.formats.lut4 import num_blocks
from qcompiler.kernels.providers import select_provider

LUT4_OP = torch.ops.qcompiler.grouped_linear_lut4.default
INT8_OP = torch.ops.qcompiler.grouped_linear_int8.default
INT8 = Int8ChannelSpec()
# spec and in_features: whole words and blocks; blocks across rows; rows of no whole words
CASES = [
    (Lut4Spec("nf4", 64, True), 320),
    (Lut4Spec("nf4", 64, False), 128),
    (Lut4Spec("fp4", 32, False), 72),
    (Lut4Spec("nf4", 64, True), 70),
    (INT8, 256),
    (INT8, 132),
    (INT8, 67),
]
FIRST = [CASES[0], CASES[4]]
ids = str


def stored(spec, inputs, seed=0):
    """Tensors of random experts, laid side by side."""
    g = torch.Generator().manual_seed(seed)
    if spec == INT8:
        codes = torch.randint(-128, 128, (EXPERTS * OUTPUTS, inputs), dtype=torch.int8, generator=g)
        return INT8_CHANNEL.pack(spec, codes, torch.rand(EXPERTS * OUTPUTS, generator=g) / 500 + 1e-4)
    parts, blocks = [], num_blocks(spec.block_size, OUTPUTS, inputs)
    for _ in range(EXPERTS):
        codes = torch.randint(0, 16, (OUTPUTS, inputs), dtype=torch.uint8, generator=g)
        if spec.double_quant:
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=g)
            nested = torch.rand(-(-blocks // 256), generator=g) * 0.3
            parts.append(LUT4.pack(spec, codes, absmax, nested, torch.rand(1, generator=g) + 0.5))
        else:
            parts.append(LUT4.pack(spec, codes, torch.rand(blocks, generator=g) + 0.5))
    return LUT4.concat(spec, parts)


def format_of(spec):
    return INT8_CHANNEL if spec == INT8 else LUT4


def case(spec, inputs, name="ragged", *, dtype=torch.float32, bias=True):
    """The op, its arguments, what each row gives by itself in float64, and |x|·|w| of each element."""
    tensors = stored(spec, inputs)
    g = torch.Generator().manual_seed(inputs)
    x = torch.randn(ROWS, inputs, generator=g).to(dtype)
    added = torch.randn(EXPERTS, OUTPUTS, generator=g).to(dtype) if bias else None
    dense = format_of(spec).dequantize(spec, tensors, inputs, torch.float64)
    wanted, size = each_row_by_itself(x, dense, added, OFFSETS[name])
    offsets = torch.tensor(OFFSETS[name], dtype=torch.int32)
    op, arguments = format_of(spec).grouped_op_call(spec, x, tensors, offsets, added, inputs)
    assert op is (INT8_OP if spec == INT8 else LUT4_OP)
    return op, list(arguments), wanted, size


def triton_provider(op):
    from qcompiler.kernels.triton.grouped.int8 import grouped_linear_int8_triton
    from qcompiler.kernels.triton.grouped.lut4 import grouped_linear_lut4_triton

    return grouped_linear_int8_triton if op is INT8_OP else grouped_linear_lut4_triton


@pytest.mark.parametrize(("spec", "inputs"), CASES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_gives_each_row_its_expert(spec, inputs, dtype):
    for name in OFFSETS:
        op, arguments, wanted, size = case(spec, inputs, name, dtype=dtype)
        y = op(*arguments)
        assert y.dtype == dtype
        assert_close(y, wanted, size)


@pytest.mark.parametrize(("spec", "inputs"), [CASES[0], CASES[1], CASES[4]], ids=ids)
def test_opcheck(spec, inputs):
    op, arguments, _, _ = case(spec, inputs, bias=spec == INT8)
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(("spec", "inputs"), CASES, ids=ids)
def test_a_call_tells_the_tensors_that_its_experts_need(spec, inputs):
    op, arguments, _, _ = case(spec, inputs)
    tensors = stored(spec, inputs)
    specs = format_of(spec).grouped_tensor_specs(spec, EXPERTS, OUTPUTS, inputs)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    assert expert_tensor_specs(format_of(spec), spec, EXPERTS, EXPERTS * OUTPUTS, inputs) == specs
    call = dict(zip([a.name for a in op._schema.arguments], arguments, strict=True))
    found = stored_weight(op._schema.name.split("::")[1], call, lambda tensor: tensor)
    assert (found.spec, found.in_features, set(found.tensors)) == (spec, inputs, set(tensors))
    assert found.experts in (1, EXPERTS)
    assert expert_tensor_specs(format_of(spec), spec, found.experts, EXPERTS * OUTPUTS, inputs) == specs


def test_llm_int8_has_no_op_for_experts_and_rows_must_divide():
    with pytest.raises(InvalidInputError, match=r"LLM\.int8"):
        INT8_CHANNEL.grouped_tensor_specs(Int8ChannelSpec(6.0), 4, 8, 64)
    with pytest.raises(InvalidInputError, match="cannot be divided among 4 experts"):
        expert_tensor_specs(LUT4, Lut4Spec(), 4, 10, 64)


def test_arguments_that_do_not_fit_are_refused_by_name():
    op, arguments, _, _ = case(*CASES[0])
    for at, change, told in (
        (0, lambda x: x[:, 1:], "x has 319 features"),
        (2, lambda absmax: absmax[1:], "absmax is"),
        (3, lambda nested: nested[1:], "nested_absmax is"),
        (4, lambda offset: offset[1:], "nested_offset is"),
        (5, lambda rows: rows[1:], "4 parts"),
        (6, lambda offsets: offsets[:4], "165 stored rows among experts"),
        (7, lambda bias: bias[:, 1:], "bias is"),
    ):
        with pytest.raises(InvalidInputError, match=f"grouped_linear_lut4: .*{told}"):
            op(*arguments[:at], change(arguments[at]), *arguments[at + 1 :])
    op, arguments, _, _ = case(*CASES[4])
    for at, change, told in (
        (0, lambda x: x[:, 1:], "x has 255 features"),
        (0, lambda x: x[None], "not rows of features"),
        (2, lambda scales: scales[1:], "scales are"),
        (3, lambda offsets: offsets[:4], "165 stored rows among experts"),
        (4, lambda bias: bias[:, 1:], "bias is"),
    ):
        with pytest.raises(InvalidInputError, match=f"grouped_linear_int8: .*{told}"):
            op(*arguments[:at], change(arguments[at]), *arguments[at + 1 :])


@pytest.mark.parametrize(("spec", "inputs"), [CASES[0], CASES[3], CASES[6]], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_provider_multiplies_with_the_dense_weight(spec, inputs, dtype):
    op, arguments, wanted, size = case(spec, inputs, dtype=dtype)
    given = dict(zip([a.name for a in op._schema.arguments], arguments, strict=True))
    settings = [n for n in ("quant_type", "block_size", "in_features", "offsets") if n in given]
    x, attributes = given.pop("x"), {name: given.pop(name) for name in settings}
    name = op._schema.name.split("::")[1]
    provider = select_provider(name, attributes, given, "cpu", dtype)
    assert provider.name == "cpu-dense"
    tensors, prepared = provider.prepare(given, attributes)
    assert tensors["weight"].shape == (EXPERTS, OUTPUTS, inputs)
    # the dense weight is rounded to x's dtype once more
    assert_close(provider.op(*provider.bind(x, tensors, prepared)), wanted, 2 * size)
    assert select_provider(name, attributes, given, "cpu", dtype, lean=True).op is op


@on_triton
@pytest.mark.parametrize(("spec", "inputs"), CASES, ids=ids)
def test_kernel(spec, inputs, target):
    op, arguments, wanted, size = case(spec, inputs, dtype=target[1])
    y = triton_provider(op)(*on_device(target, arguments))
    assert y.dtype == target[1]
    # table and absmax are each rounded to x's dtype, and so is their product
    assert_close(y, wanted, 2 * size)


@on_triton_wide
@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize(("spec", "inputs"), FIRST, ids=ids)
def test_kernel_with_empty_experts_and_rows_of_none(spec, inputs, name, target, monkeypatch):
    op, arguments, wanted, size = case(spec, inputs, name, dtype=target[1], bias=False)
    arguments = on_device(target, arguments)
    arguments[0] = poisoned(arguments[0])
    filled = give_outputs(monkeypatch, lambda made: made.fill_(torch.nan))
    assert_close(triton_provider(op)(*arguments), wanted, 2 * size)
    assert filled == [(ROWS, OUTPUTS)]


@on_triton
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize(("spec", "inputs"), FIRST, ids=ids)
def test_kernel_with_a_token_or_none(spec, inputs, rows, target):
    op, arguments, _, _ = case(spec, inputs, dtype=target[1], bias=False)
    ends = (0, 0, 0, rows, rows)
    dense = format_of(spec).dequantize(spec, stored(spec, inputs), inputs, torch.float64)
    wanted, size = each_row_by_itself(arguments[0][:rows], dense, None, ends)
    arguments = on_device(target, arguments)
    arguments[0] = arguments[0][:rows]
    offsets = next(i for i, a in enumerate(op._schema.arguments) if a.name == "offsets")
    arguments[offsets] = torch.tensor(ends, dtype=torch.int32, device=target[0])
    assert_close(triton_provider(op)(*arguments), wanted, 2 * size)


@on_triton_wide
@pytest.mark.parametrize("ends", [(-3, 10, 200, 300, 400), (30, 20, 10, 5, 40)])
@pytest.mark.parametrize(("spec", "inputs"), FIRST, ids=ids)
def test_kernel_stays_inside_x_for_any_offsets(spec, inputs, ends, target, monkeypatch):
    """A damaged graph may compute senseless offsets: results are then senseless too, accesses are not."""
    op, arguments, _, _ = case(spec, inputs, "all", dtype=target[1])
    arguments = on_device(target, arguments)
    offsets = next(i for i, a in enumerate(op._schema.arguments) if a.name == "offsets")
    arguments[offsets] = torch.tensor(ends, dtype=torch.int32, device=target[0])
    buffer = torch.full((ROWS + 400, OUTPUTS), 7.0, dtype=target[1], device=target[0])
    give_outputs(monkeypatch, lambda _: buffer[200 : 200 + ROWS])
    triton_provider(op)(*arguments)
    assert bool((buffer[:200] == 7).all())
    assert bool((buffer[200 + ROWS :] == 7).all())
