"""`grouped_linear`: every row meets its own expert's weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import on_triton, poisoned, to_target
from tolerances import assert_close

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError

OP = torch.ops.qcompiler.grouped_linear.default
OFFSETS = {
    "ragged": (0, 20, 21, 21, 47),
    "all": (10, 20, 30, 40, 50),
    "one-expert": (0, 0, 50, 50, 50),
    "none": (0,) * 5,
}
ROWS, INPUTS, OUTPUTS = 50, 70, 33


def case():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=g) / INPUTS**0.5
    weight = torch.randn(5, OUTPUTS, INPUTS, generator=g)
    return x, weight, torch.randn(5, OUTPUTS, generator=g)


def expected(x, weight, offsets, bias):
    """Each row by itself, in float64."""
    out = torch.zeros(len(x), weight.shape[1], dtype=torch.float64)
    for row in range(offsets[-1]):
        expert = next(e for e, end in enumerate(offsets) if row < end)
        out[row] = F.linear(
            x[row].double(), weight[expert].double(), None if bias is None else bias[expert].double()
        )
    return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OFFSETS)
def test_reference_gives_each_row_its_expert(name, transposed, with_bias):
    x, weight, bias = case()
    bias = bias if with_bias else None
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    out = OP(x, stored, torch.tensor(OFFSETS[name], dtype=torch.int32), bias, transposed)
    assert_close(out, expected(x, weight, OFFSETS[name], bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_keeps_the_dtype(dtype):
    x, weight, bias = (t.to(dtype) for t in case())
    out = OP(x, weight, torch.tensor(OFFSETS["ragged"], dtype=torch.int32), bias)
    assert out.dtype == dtype
    assert_close(out, expected(x, weight, OFFSETS["ragged"], bias))


def test_opcheck():
    x, weight, bias = case()
    offsets = torch.tensor(OFFSETS["ragged"], dtype=torch.int32)
    torch.library.opcheck(OP, (x, weight, offsets, bias))
    torch.library.opcheck(OP, (x, weight.transpose(1, 2), offsets, None, True))


def test_weights_of_another_width_are_refused():
    x, weight, _ = case()
    with pytest.raises(InvalidInputError, match="rows of 70 features meet weights of 33"):
        OP(x, weight, torch.tensor(OFFSETS["all"], dtype=torch.int32), None, True)


@on_triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OFFSETS)
def test_kernel_gives_each_row_its_expert(name, transposed, target):
    from qcompiler.kernels.triton.grouped.linear import grouped_linear

    x, weight, bias, offsets = to_target(target, *case(), torch.tensor(OFFSETS[name], dtype=torch.int32))
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    wanted = expected(x.cpu(), weight.cpu(), OFFSETS[name], bias.cpu())
    assert_close(grouped_linear(poisoned(x), poisoned(stored), offsets, poisoned(bias), transposed), wanted)
    # 64 input features divide evenly into tiles, which is another path through the kernel
    x, weight = x[:, :64], weight[..., :64]
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    wanted = expected(x.cpu(), weight.cpu(), OFFSETS[name], None)
    assert_close(grouped_linear(x, poisoned(stored), offsets, None, transposed), wanted)


@pytest.mark.parametrize(("rows", "experts", "smallest"), [(8, 8, 16), (4096, 8, 128), (512, 8, 64)])
def test_tile_follows_the_rows_an_expert_gets(rows, experts, smallest):
    from qcompiler.kernels.triton.grouped.linear import tile

    assert tile(rows, experts, 2)[0] == smallest
