"""Gated activations: silu(gate) · up and gelu(gate) · up in one pass, computed in fp32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qcompiler.kernels.ops.gated_activation import check_approximate
from qcompiler.kernels.triton.launch import as_rows, early_start, let_next_start, on_device, wait_for_earlier

_BLOCK = 1024


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) · up of float32; ACTIVATION is "silu", "gelu" or "gelu_tanh"."""
    if ACTIVATION == "silu":
        y = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # ½x(1 + tanh z) = x · sigmoid(2z), z = √(2/π)(x + 0.044715 x³)
        y = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return y * up


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """`gated` of sums that are rounded to DTYPE first, as they are where a linear writes them out."""
    return gated(gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), ACTIVATION)


@triton.jit
def gated_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (rows, columns / BLOCK). out [rows, columns] is contiguous."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate_at = row // gate_inner * gate_outer_stride + row % gate_inner * gate_inner_stride + column
    up_at = row // up_inner * up_outer_stride + row % up_inner * up_inner_stride + column
    wait_for_earlier(PDL)
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
    y = gated(gate, up, ACTIVATION)
    tl.store(out_ptr + row * columns + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """CUDA provider of `qcompiler::silu_mul`."""
    return gated_activation(gate, up, "silu")


def gelu_mul(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    """CUDA provider of `qcompiler::gelu_mul`."""
    check_approximate(approximate)
    return gated_activation(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up; "silu", "gelu" or "gelu_tanh"."""
    up = up.expand(gate.shape)
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    columns = gate.shape[-1]
    gate, rows, gate_inner, gate_outer_stride, gate_inner_stride = as_rows(gate)
    up, _, up_inner, up_outer_stride, up_inner_stride = as_rows(up)
    with on_device(gate):
        gated_kernel[(rows, -(-columns // _BLOCK))](
            gate, up, out, columns,
            gate_inner, gate_outer_stride, gate_inner_stride, up_inner, up_outer_stride, up_inner_stride,
            BLOCK=_BLOCK, ACTIVATION=activation, num_warps=4, **early_start(gate.device),
        )  # fmt: skip
    return out
