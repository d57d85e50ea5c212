"""Results on their way from the device to the host, which may do something else meanwhile."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch


class ReadBack:
    """Copies of tensors that are there once `wait` returns.

    On a GPU the copies go into pinned memory behind the work that computes the tensors, and an event says
    when they are whole; so the host waits for this work and for nothing that was given to the GPU later.

    Args:
        tensors: What to copy, all on one device; none where only the end of the work matters.
        device: Where they are.
    """

    def __init__(self, tensors: Seq[torch.Tensor], device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._copies = [tensor.clone() for tensor in tensors]  # the next step may write over them
            return
        self._copies = []
        for tensor in tensors:
            # The allocator of pinned memory hands out nothing that a copy is still under way to.
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            self._copies.append(copy)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[torch.Tensor]:
        """The copies, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
