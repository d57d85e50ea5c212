"""A table that a Gluon kernel keeps in shared memory and reads at addresses of its own.

Gluon has no indexed load from shared memory, so such kernels load by assembly, from the symbol `global_smem`
on, where the compiler places the first allocation. They allocate nothing but their table; `check_alone` sees
to it that the compiler added nothing either.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from triton.runtime import driver

from qcompiler.kernels.errors import QCompilerError


@cache
def table_bytes(device: torch.device) -> int:
    """How large a table a program may keep; 0 where these kernels cannot run."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return 0
    properties = driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def check_alone(kernel: Any, nbytes: int) -> None:
    """Refuse the result of a launched kernel whose shared memory is not just its table.

    Raises:
        QCompilerError: The compiler of this Triton release lays shared memory out in another way.
    """
    if kernel.metadata.shared != nbytes:
        raise QCompilerError(
            f"{kernel.metadata.name} uses {kernel.metadata.shared} bytes of shared memory beside a table "
            f"of {nbytes}.",
            hint="Install the Triton release that constraints/dev.txt names.",
        )
