"""The Triton kernels of linear_lut4, linear_int8 and linear_llm_int8 against the references, on ragged sizes.

Activations lie in memory that is NaN around them, and so do statistics and scales: a kernel that
reads past an edge and uses what it found gives NaN.
"""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, poisoned

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.formats import LUT4, Lut4Spec
from qcompiler.kernels.formats.lut4 import num_blocks
from qcompiler.kernels.ops.linear_int8 import linear_int8_reference
from qcompiler.kernels.ops.linear_llm_int8 import linear_llm_int8_reference, quantize_rows
from qcompiler.kernels.ops.linear_lut4 import linear_lut4_reference

pytest.importorskip("triton")
from qcompiler.kernels.triton.linear.int8 import dequantize_int8_triton, linear_int8_triton
from qcompiler.kernels.triton.linear.llm_int8 import linear_llm_int8_triton, quantize_rows_triton
from qcompiler.kernels.triton.linear.lut4 import dequantize_lut4_triton, linear_lut4_triton
from qcompiler.kernels.tuning.tables import LinearConfig

# tokens, and the kernel: GEMV and GEMM, with and without split K
ROADS = [
    (1, LinearConfig("gemv", 16, 1, 1, 4, 2)),
    (2, LinearConfig("gemv", 16, 1, 2, 4, 2)),
    (19, LinearConfig("gemm", 32, 16, 1, 4, 2)),
    (5, LinearConfig("gemm", 32, 16, 2, 4, 2)),
]
on_roads = pytest.mark.parametrize(
    ("tokens", "config"), ROADS, ids=lambda value: getattr(value, "kind", value)
)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, with NaN before and after them (127 for integers)."""
    edge = torch.full((8,), float("nan") if tensor.is_floating_point() else 127, device=tensor.device)
    flat = torch.cat([edge.to(tensor.dtype), tensor.flatten(), edge.to(tensor.dtype)])
    return flat[8:-8].view(tensor.shape)


def close(actual: torch.Tensor, expected: torch.Tensor, weight_rounding: bool = False) -> None:
    """Equal up to the rounding of the result, and of the weight where the kernel rounds it."""
    eps = torch.finfo(expected.dtype).eps
    assert actual.dtype == expected.dtype
    scale = expected.float().abs().max()
    error = (actual.float() - expected.float()).abs().max()
    assert error <= (4 if weight_rounding else 2) * max(eps, 4e-7) * scale, f"{error} of {scale}"


def lut4_case(spec, parts, k, device):
    generator = torch.Generator().manual_seed(0)
    stored = []
    for rows in parts:
        blocks = num_blocks(spec.block_size, rows, k)
        codes = torch.randint(0, 16, (rows, k), dtype=torch.uint8, generator=generator)
        if spec.double_quant:
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
            nested = torch.rand(-(-blocks // 256), generator=generator) * 0.3
            stored.append(LUT4.pack(spec, codes, absmax, nested, torch.rand(1, generator=generator) + 0.5))
        else:
            stored.append(LUT4.pack(spec, codes, torch.rand(blocks, generator=generator) + 0.5))
    return {name: guarded(t.to(device)) for name, t in LUT4.concat(spec, stored).items()}


LUT4_CASES = [
    (Lut4Spec("nf4", 64, True), (40,), 256),
    (Lut4Spec("nf4", 64, True), (21, 40, 3), 320),
    (Lut4Spec("fp4", 64, False), (37,), 192),
    (Lut4Spec("nf4", 512, True), (9, 12), 1024),
    (Lut4Spec("nf4", 64, True), (17, 6), 136),  # blocks cross rows
    (Lut4Spec("fp4", 32, False), (33,), 70),  # and rows are no whole words
]


@on_triton
@on_roads
@pytest.mark.parametrize(("spec", "parts", "k"), LUT4_CASES, ids=str)
def test_lut4(target, spec, parts, k, tokens, config):
    device, dtype = target
    if config.kind == "gemm" and dtype == torch.float32 and device != "cpu":
        pytest.skip("float32 takes the dense road on a GPU")
    tensors = lut4_case(spec, parts, k, device)
    x = poisoned(torch.randn(tokens, k).to(device, dtype))
    bias = guarded(torch.randn(sum(parts)).to(device, dtype))
    _, arguments = LUT4.op_call(spec, x, tensors, bias, k)
    close(
        linear_lut4_triton(*arguments, config=config),
        linear_lut4_reference(*arguments),
        config.kind == "gemm",
    )


@on_triton
@pytest.mark.parametrize(("spec", "parts", "k"), LUT4_CASES, ids=str)
def test_lut4_dense_weight(target, spec, parts, k):
    device, dtype = target
    tensors = lut4_case(spec, parts, k, device)
    names = ("codes", "absmax", "nested_absmax", "nested_offset", "part_rows")
    weight = dequantize_lut4_triton(*map(tensors.get, names), spec.quant_type, spec.block_size, k, dtype)
    close(weight, LUT4.dequantize(spec, tensors, k, dtype))


def int8_case(n, k, tokens, target, outliers=()):
    device, dtype = target
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator).to(device)
    scales = guarded((torch.rand(n, generator=generator) / 500 + 1e-4).to(device))
    x = torch.randn(tokens, k, generator=generator).clamp(-3, 3)
    for column in outliers:
        x[column % tokens, column] = 40.0 + column
    bias = guarded(torch.randn(n, generator=generator).to(device, dtype))
    return poisoned(x.to(device, dtype)), guarded(codes), scales, bias


@on_triton
@on_roads
@pytest.mark.parametrize(("n", "k"), [(40, 256), (37, 132), (33, 67)])
def test_int8(target, n, k, tokens, config):
    if config.kind == "gemm" and target == ("cuda", torch.float32):
        pytest.skip("float32 takes the dense road on a GPU")
    case = int8_case(n, k, tokens, target)
    close(linear_int8_triton(*case, config=config), linear_int8_reference(*case))


@on_triton
def test_int8_dense_weight(target):
    _, codes, scales, _ = int8_case(37, 67, 1, target)
    close(dequantize_int8_triton(codes, scales, target[1]), (codes.float() * scales[:, None]).to(target[1]))


@on_triton
@on_roads
@pytest.mark.parametrize(("n", "k"), [(40, 256), (33, 67)])
@pytest.mark.parametrize("outliers", [(), (3, 41), tuple(range(5, 60))], ids=len)
@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_llm_int8(target, n, k, tokens, config, outliers, threshold):
    case = int8_case(n, k, tokens, target, outliers)
    expected = linear_llm_int8_reference(*case, threshold)
    close(linear_llm_int8_triton(*case, threshold, config=config), expected, weight_rounding=True)


@on_triton
@pytest.mark.parametrize("k", [256, 67])
def test_row_codes_absmax_and_columns_equal_the_reference(target, k):
    x, *_ = int8_case(8, k, 7, target, (3, 41, 60))
    x[2] = 0.0
    limit = 6.0
    codes, absmax, columns = quantize_rows_triton(x, limit)
    wanted, wanted_absmax, flags = quantize_rows(x, limit)
    assert torch.equal(columns[: int(columns[-1])].long(), flags.nonzero()[:, 0])
    assert torch.equal(absmax, wanted_absmax)
    # In outlier columns the kernel keeps the codes of ordinary elements; the product makes up for them.
    assert torch.equal(codes[:, :k][:, ~flags], wanted[:, ~flags])
    assert not codes[:, k:].any()
    assert not codes[:, :k][x.float().abs() >= limit].any()


@on_triton
def test_the_launchers_choose_a_road_and_take_empty_batches(target):
    device, dtype = target
    spec = Lut4Spec("nf4", 64, True)
    tensors = lut4_case(spec, (40,), 256, device)
    case = int8_case(40, 256, 3, target, (7,))
    for tokens in (0, 1, 3):
        x = torch.randn(2, tokens, 256).to(device, dtype)
        _, arguments = LUT4.op_call(spec, x, tensors, None, 256)
        y = linear_lut4_triton(*arguments)
        assert y.shape == (2, tokens, 40)
        if tokens:
            close(y, linear_lut4_reference(*arguments), weight_rounding=True)
        assert linear_int8_triton(x, *case[1:]).shape == (2, tokens, 40)
        assert linear_llm_int8_triton(x, *case[1:], 6.0).shape == (2, tokens, 40)
