"""Where Triton kernels run in tests: the interpreter on the CPU, or a CUDA device; and poisoned memory."""

from __future__ import annotations

import os

import pytest
import torch


def _targets(interpreted_dtypes):
    interpreted = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here, not interpreted"
    )
    compiled = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    # bf16 arithmetic is wrong in the interpreter of triton 3.6, so bf16 waits for a GPU.
    for dtype in interpreted_dtypes:
        yield pytest.param(("cpu", dtype), id=f"interpreter-{dtype}", marks=interpreted)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield pytest.param(("cuda", dtype), id=f"cuda-{dtype}", marks=[pytest.mark.gpu, compiled])


# Runs a test of a Triton kernel for each (device, dtype) that this machine can run.
on_triton = pytest.mark.parametrize("target", list(_targets([torch.float32, torch.float16])))
# The same for wide grids of cases: the slow interpreter sees float32 alone, whose tolerance is the tightest.
on_triton_wide = pytest.mark.parametrize("target", list(_targets([torch.float32])))


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same values as a strided view into a buffer that is NaN everywhere else."""
    buffer = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(1, size + 1) for size in x.shape)]
    view.copy_(x)
    return view


def to_target(target, *tensors):
    """Tensors on the target's device, floating ones in its dtype; None stays."""
    device, dtype = target
    return tuple(
        None if t is None else t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in tensors
    )
