"""How large the KV cache may be: from the memory that is left once the weights are in place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.runtime.batch import Span
from qcompiler.runtime.executor import Executor
from qcompiler.runtime.pages import PageSpec, page_specs
from qcompiler.runtime.program import Program

# Part of the free memory that the cache may take.
_GPU_SHARE = 0.9
_CPU_SHARE = 0.5


@dataclass(frozen=True)
class Limits:
    """Sequences that run at once, tokens per step, and pages of the cache."""

    max_sequences: int
    max_step_tokens: int
    num_pages: int
    page_size: int


def make_executor(
    program: Program,
    *,
    max_context: int,
    position_offset: int = 0,
    max_sequences: int | None = None,
    max_step_tokens: int | None = None,
    max_cache_tokens: int | None = None,
    cuda_graphs: bool = True,
) -> tuple[Executor, Limits]:
    """Plan the cache and allocate it.

    Args:
        program: The decoder, its weights already on the device.
        max_context: Most tokens of one sequence.
        position_offset: Position id of a sequence's first token.
        max_sequences: Default 64 on a GPU, 16 on the CPU.
        max_step_tokens: Default 8192 on a GPU, 1024 on the CPU.
        max_cache_tokens: Default: every sequence at full context, if memory allows.
        cuda_graphs: See `Executor`.

    Raises:
        InvalidInputError: an option is no positive number, or not one page fits.
    """
    gpu = program.device.type == "cuda"
    sequences = _positive("max_sequences", max_sequences, 64 if gpu else 16, most=4096)
    step = _positive("max_step_tokens", max_step_tokens, 8192 if gpu else 1024, most=1 << 20)
    specs, fixed = page_specs(program.graph)
    # A page as long as the attention kernels' tile of keys: 128 once a key is as short as a quantized one.
    quantized = any(spec.dtype == torch.int16 for spec in specs)
    page_size = fixed or ((128 if quantized else 64) if gpu else 16)
    page_bytes = page_size * sum(s.token_bytes for s in specs)
    per_sequence = -(-max_context // page_size)
    wanted = sequences * per_sequence
    if max_cache_tokens is not None:
        wanted = -(-_positive("max_cache_tokens", max_cache_tokens, 1, most=1 << 40) // page_size)
    room = wanted
    if specs:
        free = _gpu_room(program, specs, page_size, min(step, max_context)) if gpu else _cpu_room()
        room = free // page_bytes
    if room < 1:
        raise InvalidInputError(
            f"there is no memory left for the KV cache: a page takes {page_bytes} bytes",
            hint="Use a smaller model or another device.",
        )
    if max_cache_tokens is not None and room < wanted:
        raise InvalidInputError(
            f"max_cache_tokens {max_cache_tokens} takes {wanted * page_bytes} B, {room * page_bytes} B free",
            hint=f"At most {room * page_size} tokens fit.",
        )
    limits = Limits(sequences, step, min(wanted, room), page_size)
    executor = Executor(
        program,
        specs,
        limits.num_pages,
        page_size,
        position_offset=position_offset,
        cuda_graphs=cuda_graphs,
    )
    return executor, limits


def _gpu_room(program: Program, specs: list[PageSpec], page_size: int, step: int) -> int:
    """Bytes for the cache: free memory less what the largest step takes, which is run once to see."""
    device = program.device
    pages = -(-step // page_size)
    trial = Executor(program, specs, pages, page_size, cuda_graphs=False)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    trial.run([Span([0] * step, 0, range(pages), [step - 1])])
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_allocated(device) - before
    del trial
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _GPU_SHARE) - needed


def _cpu_room() -> int:
    """Bytes for the cache: half of what the system says is available; pages take memory only when used."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 8 << 30
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(int(found.group(1)) * 1024 * _CPU_SHARE) if found else 8 << 30


def _positive(name: str, value: int | None, default: int, *, most: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise InvalidInputError(f"{name} must be a whole number in [1, {most}], not {value!r}")
    return value
