"""What every launcher needs: the tensor's device as the current one, its size, and row addressing."""

from __future__ import annotations

import contextlib
import functools

import torch


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
