"""What every launcher needs: the tensor's device as the current one, its size, row addressing, early starts.

A kernel that starts early (programmatic dependent launch, CUDA programming guide) is set up while the ones
before it still run. Every program of it calls `wait_for_earlier` before it reads or writes anything; so a
kernel has ended only after all that were launched before it have, and any kernel may follow. What may be
done before the wait is `prefetch`: it moves lines into the L2 cache and cannot read anything stale.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction

# How kernels start: in turn, early, or early and with their first weights on the way. QCOMPILER_PDL in the
# environment (0, 1, 2) or `allow_early_starts` choose another than the last.
IN_TURN, EARLY, EARLY_WITH_WEIGHTS = range(3)
_LEVELS = {"0": IN_TURN, "1": EARLY, "2": EARLY_WITH_WEIGHTS}
_level = _LEVELS.get(os.environ.get("QCOMPILER_PDL", ""), EARLY_WITH_WEIGHTS)


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel be set up as soon as all programs of this one run.

    First in a kernel: further down ptxas (CUDA 12.8) takes it for a reason to serialize the wgmma of a loop.
    """
    if PDL > 0:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """Wait until all kernels launched before this one have ended, and what they wrote can be read."""
    if PDL > 0:
        cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Bring the 32 bytes around each pointer into the L2 cache; for kernels compiled for a GPU."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def allow_early_starts(level: int) -> int:
    """Choose how kernels start on devices that can start them early; gives what was chosen before."""
    global _level
    before, _level = _level, level
    return before


def starts_early(device: torch.device) -> bool:
    """Whether kernels on `device` start early: allowed, compiled, on Hopper or later."""
    return _level > IN_TURN and _can_start_early(device)


@functools.cache
def _can_start_early(device: torch.device) -> bool:
    compiled = not isinstance(wait_for_earlier, InterpretedFunction)
    return compiled and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early_start(device: torch.device) -> dict[str, Any]:
    """What a launch of a kernel that calls `wait_for_earlier(PDL)` is given besides its own arguments."""
    # Only where it is used: other backends do not know the option.
    return {"PDL": _level, "launch_pdl": True} if starts_early(device) else {"PDL": IN_TURN}


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make x's GPU the current one; Triton launches on the current device, the dispatcher does not switch."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's 132 for the interpreter."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def half_of(dtype: torch.dtype) -> tl.dtype:
    """The 16-bit type that a kernel's tensor cores take for activations of a dtype."""
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """Activations [..., features] as [tokens, features], each row contiguous; a view where it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up; `triton.cdiv`, made for kernels, takes a launcher microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """Address x [..., N] as rows at `r // inner · outer_stride + r % inner · inner_stride`.

    Slices of a fused projection, also when split into heads, are read in place;
    anything less regular is copied. One run of rows has inner 1, which Triton
    compiles away.

    Returns:
        (x or its copy, rows, inner, outer_stride, inner_stride), strides in elements.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns if columns else 0
    groups = _collapse(x)
    if len(groups) > 2 or (columns > 1 and x.stride(-1) != 1):
        x = x.contiguous()
        groups = [(rows, columns)]
    if not groups:
        groups = [(1, columns)]
    if len(groups) == 1:
        groups.append((1, 0))
    (_, outer_stride), (inner, inner_stride) = groups
    return x, rows, max(inner, 1), outer_stride, inner_stride


def _collapse(x: torch.Tensor) -> list[tuple[int, int]]:
    """Leading dimensions of x as (size, stride), neighbours merged where one stride walks both."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups
