"""The lut4 format and its op: tables, accounting, weights side by side, blocks across rows, refusals."""

from __future__ import annotations

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import LUT4, Lut4Spec, get_format
from qcompiler.kernels.formats.lut4 import BLOCK_SIZES, dynamic_map, num_blocks, table

SPECS = [
    Lut4Spec(kind, block, double) for kind in ("nf4", "fp4") for block in (32, 64) for double in (True, False)
]


def stored(spec: Lut4Spec, n: int, k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    blocks = num_blocks(spec.block_size, n, k)
    if not spec.double_quant:
        return LUT4.pack(spec, codes, torch.rand(blocks, generator=generator) + 0.5)
    nested = torch.rand(-(-blocks // 256), generator=generator) * 0.3
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    return LUT4.pack(spec, codes, absmax, nested, torch.tensor([1.0 + seed]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("k", [128, 72, 70])
def test_a_weight_is_its_table_value_times_the_absmax_of_its_block(spec, k):
    n = 20
    tensors = stored(spec, n, k)
    codes, absmax = LUT4.unpack(spec, tensors, k)
    weight = LUT4.dequantize(spec, tensors, k, torch.float64)
    for row, column in ((0, 0), (7, k - 1), (n - 1, 5)):
        wanted = (
            table(spec.quant_type)[int(codes[row, column])] * absmax[(row * k + column) // spec.block_size]
        )
        assert weight[row, column] == wanted
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (s.shape, s.dtype) for name, s in LUT4.tensor_specs(spec, n, k).items()
    }


def test_double_quantized_absmax_is_a_step_of_the_dynamic_map_in_blocks_of_256():
    spec = Lut4Spec("nf4", 64, True)
    tensors = stored(spec, 40, 1024)
    _, absmax = LUT4.unpack(spec, tensors, 1024)
    codes = tensors["absmax"].flatten()
    for block in (0, 255, 256, 639):
        wanted = (
            dynamic_map()[int(codes[block])] * tensors["nested_absmax"][block // 256]
            + tensors["nested_offset"]
        )
        assert absmax[block] == wanted


def test_the_even_element_is_in_the_high_nibble():
    spec = Lut4Spec("nf4", 32, False)
    codes = torch.arange(32, dtype=torch.uint8).remainder(16)[None]
    assert LUT4.pack(spec, codes, torch.ones(1))["codes"][0, :2].tolist() == [0x01, 0x23]


def test_bits_per_weight_count_everything():
    n = k = 4096
    assert LUT4.bits_per_weight(Lut4Spec("nf4", 64, False), n, k) == 4.5
    # 8 bits per block, 32 per 256 blocks, and one offset and one row count per weight matrix.
    wanted = 4 + 8 / 64 + 32 / (64 * 256) + 64 / (n * k)
    assert LUT4.bits_per_weight(Lut4Spec("nf4", 64, True), n, k) == pytest.approx(wanted, abs=1e-12)
    assert round(wanted, 3) == 4.127


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("k", [256, 70])
def test_weights_side_by_side_are_the_parts_one_below_the_other(spec, k):
    parts = [stored(spec, rows, k, seed) for seed, rows in enumerate((24, 7, 7))]
    joined = LUT4.concat(spec, parts)
    wanted = torch.cat([LUT4.dequantize(spec, part, k, torch.float32) for part in parts])
    assert torch.equal(LUT4.dequantize(spec, joined, k, torch.float32), wanted)
    for name, tensor in joined.items():  # a plain concatenation, which a graph pass can stream
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("k", [128, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_a_linear_on_the_dequantized_weight(spec, k, dtype):
    tensors, x = stored(spec, 24, k), torch.randn(2, 3, k).to(dtype)
    bias = torch.randn(24).to(dtype)
    op, arguments = LUT4.op_call(spec, x, tensors, bias, k)
    y = op(*arguments)
    wanted = x.double() @ LUT4.dequantize(spec, tensors, k, torch.float64).T + bias.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
@pytest.mark.parametrize("k", [128, 70])
def test_opcheck(spec, k):
    op, arguments = LUT4.op_call(spec, torch.randn(3, k), stored(spec, 10, k), torch.randn(10), k)
    torch.library.opcheck(op, arguments)


def test_settings_survive_json_and_wrong_ones_are_refused():
    for spec in SPECS:
        assert get_format("lut4").spec_from_json(spec.to_json()) == spec
    with pytest.raises(InvalidInputError, match="Not the settings"):
        Lut4Spec.from_json({**SPECS[0].to_json(), "block_size": True})
    with pytest.raises(InvalidInputError, match="block size 48"):
        Lut4Spec("nf4", 48)
    with pytest.raises(InvalidInputError, match="table 'int4'"):
        Lut4Spec("int4")
    assert all(block == 2**i for i, block in enumerate(BLOCK_SIZES, start=5))


def test_an_odd_width_is_refused_with_a_way_out():
    with pytest.raises(InvalidInputError, match="in_features is 33, odd"):
        LUT4.tensor_specs(Lut4Spec(), 4, 33)


def test_arguments_that_do_not_fit_are_refused_by_name():
    spec = Lut4Spec("nf4", 64, True)
    tensors = stored(spec, 8, 128)
    op, arguments = LUT4.op_call(spec, torch.randn(2, 64), tensors, None, 128)
    with pytest.raises(InvalidInputError, match="x has 64 features"):
        op(*arguments)
    op, arguments = LUT4.op_call(spec, torch.randn(2, 128), {**tensors, "part_rows": None}, None, 128)
    with pytest.raises(InvalidInputError, match="part_rows is missing"):
        op(*arguments)
    with pytest.raises(InvalidInputError, match="do not add up"):
        LUT4.dequantize(
            spec, {**tensors, "part_rows": torch.tensor([7], dtype=torch.int32)}, 128, torch.float32
        )
    with pytest.raises(InvalidInputError, match="absmax is missing"):
        LUT4.pack(spec, torch.zeros(8, 128, dtype=torch.uint8), None)
