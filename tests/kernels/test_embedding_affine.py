"""`embedding_affine`: the rows of the dequantized table, bit for bit, and the same tensors as a linear."""

from __future__ import annotations

import pytest
import torch
from devices import on_triton, on_triton_wide

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import AFFINE, AffineSpec
from qcompiler.kernels.formats.affine import BITS, num_groups

OP = torch.ops.qcompiler.embedding_affine.default
VOCABULARY = 50
IDS = torch.tensor([[0, 49, 7, 7, 3], [12, 0, 1, 31, 48]])


def table(spec, dim):
    g = torch.Generator().manual_seed(dim + spec.bits)
    groups = num_groups(spec.group_size, dim)
    codes = torch.randint(0, 2**spec.bits, (VOCABULARY, dim), dtype=torch.uint8, generator=g)
    scales = (torch.rand(VOCABULARY, groups, generator=g) + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(VOCABULARY, groups, generator=g)
    return AFFINE.pack(spec, codes, scales, zeros)


def case(bits, group_size, dim, dtype, ids=IDS):
    spec = AffineSpec(bits, group_size)
    tensors = table(spec, dim)
    op, arguments = AFFINE.embedding_op_call(spec, ids, tensors, dim, dtype)
    assert op is OP
    return arguments, AFFINE.dequantize(spec, tensors, dim, torch.float32)[ids.long()].to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [0, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_gives_rows_of_the_table(bits, group_size, dtype):
    arguments, wanted = case(bits, group_size, 100, dtype)
    y = OP(*arguments)
    assert y.dtype == dtype
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("bits", [4, 5])
def test_opcheck(bits):
    torch.library.opcheck(OP, case(bits, 32, 70, torch.bfloat16)[0])


def test_a_linear_reads_the_same_tensors():
    spec = AffineSpec(4, 32)
    tensors = table(spec, 64)
    op, arguments = AFFINE.embedding_op_call(spec, torch.arange(VOCABULARY), tensors, 64, torch.float32)
    head, given = AFFINE.op_call(spec, torch.eye(64), tensors, None, 64)
    torch.testing.assert_close(head(*given), op(*arguments).T)


def test_no_ids_give_no_rows_and_strange_ones_are_refused():
    arguments, _ = case(4, 32, 64, torch.float32, torch.zeros(1, 0, dtype=torch.int64))
    assert OP(*arguments).shape == (1, 0, 64)
    with pytest.raises(InvalidInputError, match=r"ids are torch\.float32"):
        OP(torch.zeros(3), *arguments[1:])
    with pytest.raises(IndexError):
        OP(torch.tensor([VOCABULARY]), *arguments[1:])


def guarded(tensor, device):
    fill = float("nan") if tensor.is_floating_point() else (255 if tensor.dtype == torch.uint8 else -1)
    buffer = torch.full((tensor.numel() + 4096,), fill, dtype=tensor.dtype, device=device)
    return buffer[2048 : 2048 + tensor.numel()].view(tensor.shape).copy_(tensor)


def run_kernel(arguments, device):
    from qcompiler.kernels.triton.embedding_affine import embedding_affine_triton

    return embedding_affine_triton(
        *(guarded(a, device) if isinstance(a, torch.Tensor) else a for a in arguments)
    ).cpu()


@on_triton
@pytest.mark.parametrize("bits", BITS)
def test_kernel_equals_the_table(bits, target):
    arguments, wanted = case(bits, 64, 320, target[1])
    assert torch.equal(run_kernel(arguments, target[0]), wanted)


@on_triton_wide
@pytest.mark.parametrize("group_size", [0, 16, 256])
@pytest.mark.parametrize(("bits", "dim"), [(4, 64), (3, 77), (8, 31)])
def test_kernel_on_ragged_widths(bits, dim, group_size, target):
    arguments, wanted = case(bits, group_size, dim, target[1], IDS.to(torch.int32))
    assert torch.equal(run_kernel(arguments, target[0]), wanted)


@on_triton_wide
def test_kernel_answers_ids_outside_of_the_table_with_nan(target):
    ids = torch.tensor([3, -1, VOCABULARY, 1 << 40, 5])
    arguments, _ = case(4, 32, 64, target[1], torch.zeros(5, dtype=torch.int64))
    y = run_kernel((ids, *arguments[1:]), target[0])
    assert y.isnan().all(dim=1).tolist() == [False, True, True, True, False]
