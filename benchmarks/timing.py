"""Times GPU work as it runs in practice, and the ceilings it is held against, in the same process.

Every timing is the median over replays of a CUDA graph in which the weights
rotate past the L2 cache. The read ceiling of a size is the fastest of several
plain streaming reads of as many bytes, one launch each.
"""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from qcompiler.kernels.tuning.timing import copies_past_l2, graph_microseconds


def read_ceiling(count: int, repeats: int = 10) -> float:
    """Fastest of several streaming reads of `count` bytes, µs."""
    from benchmarks.stream_read import stream_read

    words = -(-count // 4)
    buffers = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(copies_past_l2(4 * words))]
    best = float("inf")
    for block, warps, steps in ((1024, 4, 1), (2048, 4, 2), (4096, 8, 1), (4096, 8, 4), (2048, 4, 8)):
        programs = -(-words // (block * steps))
        out = torch.empty(programs, dtype=torch.int32, device="cuda")
        calls = [
            lambda buffer=buffer, grid=(programs,), out=out, block=block, steps=steps, warps=warps: (
                stream_read[grid](buffer, out, words, BLOCK=block, STEPS=steps, num_warps=warps)
            )
            for buffer in buffers
        ]
        best = min(best, graph_microseconds(calls, repeats))
    return best


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_microseconds([lambda: target.copy_(source)]) * 1e6


def driver_version() -> str:
    """Of the kernel module, or "unknown"."""
    path = Path("/proc/driver/nvidia/version")
    found = (
        re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", path.read_text()) if path.is_file() else None
    )
    return found.group(1) if found else "unknown"


def machine(device: str = "cuda") -> dict[str, Any]:
    """What the figures were taken on, and of a GPU its ceilings, measured now.

    Copy bandwidth counts bytes read and written; `read_tb_per_second` is by megabytes read.
    """
    if not device.startswith("cuda"):
        facts = {"torch": torch.__version__, "python": platform.python_version()}
        return {"command": command(), "gpu": platform.processor() or "CPU", **facts}
    import triton

    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = graph_microseconds([lambda: left @ right])
    return {
        "command": command(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "copy_tb_per_second": copy_bandwidth() / 1e12,
        "read_tb_per_second": {str(mb): mb / read_ceiling(mb * 10**6) for mb in (10, 30, 100, 300)},
        "bf16_tflop_per_second": 2 * 8192**3 / product / 1e6,
    }


def command() -> str:
    """What was typed, with folders of this machine left out."""
    name = Path(sys.argv[0]).stem
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python -m", "benchmarks" if name == "__main__" else f"benchmarks.{name}", *words])
