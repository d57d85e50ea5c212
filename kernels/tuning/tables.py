"""Which kernel with which tile sizes: a measured table per GPU model where there is one, else a heuristic.

A table is `<gpu>.json` beside this file, `<gpu>` the device name in lower case
with underscores: {"schema": 1, "gpu": name, "measured_with": {...}, "entries":
{key: config}}. A key names op, format, shape and token bucket, e.g.
"linear_affine/affine-b4-g64/n4096-k4096/m16/bfloat16". Nothing is tuned while
serving: `qrun tune` writes tables into a folder of the user's, whose entries go
before those that ship; `benchmarks/linear.py --tune` writes the latter.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import ArtifactError

_FOLDER = Path(__file__).parent
# Whether the streaming kernel is chosen where nothing was measured.
STREAM_UNMEASURED = False
KINDS = ("gemv", "quads", "dots", "gemm", "wide", "stream", "shared", "dense")


@dataclass(frozen=True)
class LinearConfig:
    """How one linear runs.

    Args:
        kind: "gemv" or "quads" (float32 units), "dots", "gemm" or "wide" (tensor cores, fused, from few to
            many tokens), "stream" (the same on Hopper, copying meanwhile), "shared" (codebooks in shared
            memory) or "dense" (dequantize, library matmul).
        block_n: Output channels per program.
        block_m: Tokens per program.
        split_k: Programs that share one output tile along in_features; at most so many for "stream",
            slices of output channels for "dense".
        num_warps: Warps per program, those that only copy not counted.
        num_stages: Pipeline depth, for "stream" that of the weight's words.
    """

    kind: str
    block_n: int = 64
    block_m: int = 16
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        sizes = (self.block_n, self.block_m, self.split_k, self.num_warps, self.num_stages)
        if self.kind not in KINDS or not all(type(size) is int and 1 <= size <= 1024 for size in sizes):
            raise ArtifactError(f"Not a kernel configuration: {self!r}.")

    def to_json(self) -> dict[str, Any]:
        """The table entry."""
        return asdict(self)


def token_bucket(tokens: int) -> int:
    """The power of two at or above `tokens`: shapes of one bucket share a configuration."""
    return 1 << max(0, tokens - 1).bit_length()


def table_key(bits: int, group_size: int, n: int, k: int, tokens: int, dtype: str) -> str:
    """Key of a table entry; `dtype` as in "bfloat16"."""
    return f"linear_affine/affine-b{bits}-g{group_size}/n{n}-k{k}/m{token_bucket(tokens)}/{dtype}"


def table_path(gpu: str, folder: Path = _FOLDER) -> Path:
    """Where the table of a GPU model lies or would lie."""
    return folder / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json")


def user_folder() -> Path:
    """Where the user's own tables lie: $QCOMPILER_TUNING, else $XDG_DATA_HOME/qcompiler/tuning."""
    named = os.environ.get("QCOMPILER_TUNING")
    if named:
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "qcompiler" / "tuning"


@lru_cache(maxsize=16)
def load_table(gpu: str, folder: Path | None = None) -> dict[str, LinearConfig]:
    """Entries measured on a GPU model; empty when nobody measured there.

    Args:
        gpu: Device name.
        folder: Of the table; the shipped one with the user's entries before its own when None. Read once.

    Raises:
        ArtifactError: A file is not a table of this schema.
    """
    if folder is None:
        return {**_entries(table_path(gpu)), **_entries(table_path(gpu, user_folder()))}
    return _entries(table_path(gpu, folder))


def _entries(path: Path) -> dict[str, LinearConfig]:
    if not path.is_file():
        return {}
    hint = f"Remove {path}, or write it anew with qrun tune."
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1:
            raise ArtifactError(f"{path.name} has schema {data['schema']}, not 1.", hint=hint)
        return {key: LinearConfig(**entry) for key, entry in data["entries"].items()}
    except ArtifactError as error:
        raise ArtifactError(f"{path.name}: {error.message}", hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} is not a tuning table: {error}.", hint=hint) from error


def check_writable(path: Path) -> None:
    """See, before anything is measured, whether `write_table` can add to this file.

    Raises:
        ArtifactError: What is there is no table.
        OSError: The folder cannot be made or written to.
    """
    _entries(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_table(
    path: Path, gpu: str, entries: Mapping[str, LinearConfig], measured_with: Mapping[str, str]
) -> None:
    """Add entries to a table, or begin one; a reader sees the old file or the new one, never half of it.

    Args:
        path: The file, in a folder that is made if need be.
        gpu: Device name as the driver tells it.
        entries: Configurations by `table_key` and its like.
        measured_with: Versions of torch, triton and CUDA.

    Raises:
        ArtifactError: What is there is no table.
        OSError: It cannot be written.
    """
    merged = {key: config.to_json() for key, config in {**_entries(path), **entries}.items()}
    facts = {"schema": 1, "gpu": gpu, "measured_with": dict(measured_with)}
    table = {**facts, "entries": dict(sorted(merged.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    load_table.cache_clear()


def heuristic(
    bits: int, n: int, k: int, tokens: int, dtype: str, sms: int, *, stream: bool = False
) -> LinearConfig:
    """A sane configuration where nothing was measured, in the pattern of what was measured on an H100.

    One token runs on the float32 units, up to 16 on tensor cores that take the codes as they are (where those
    fit: else the float32 units for two); up to 512 on tensor cores with the weight dequantized in registers,
    for many of them one plane at a time beside a large tile of tokens; beyond that the weight is written out
    once. float32 activations never use tensor cores, which would round them. `stream`: more than two tokens
    take the streaming kernel.
    """
    bucket = token_bucket(tokens)
    if stream and tokens > 2 and dtype != "float32":
        return _stream(n, tokens, sms)
    most = 2  # programs per SM that the splits of K are to give
    if dtype == "float32":
        if tokens > 4:
            return LinearConfig("dense")
        kind, block_n, block_m, warps, stages = "gemv", max(16, 64 // bucket), bucket, 4, 2
    elif tokens > 512:
        return LinearConfig("dense")
    elif 1 < tokens <= 16 and bits in (2, 4):
        kind, block_n, block_m, stages, most = "dots", 32, max(8, bucket), 3, 7
        warps = 1 if bits == 4 else 2  # eight planes unrolled over two tiles of rows would spill
    elif tokens <= 2:
        kind, block_n, block_m, warps, stages = "quads", 8 if bits > 3 and tokens == 1 else 4, bucket, 2, 1
    elif tokens <= 64:
        kind, block_n, block_m, warps, stages = "gemm", 64, max(16, bucket), 4, 3
    else:
        kind, block_n, block_m, warps, stages = "wide", 128, 128, 8, 3
    programs = -(-n // block_n) * -(-tokens // block_m)
    # Fill the SMs some times over, but keep at least 1024 codes of K per program.
    split = max(1, min(most * sms // programs, k // 1024, 8))
    return LinearConfig(kind, block_n, block_m, split, warps, stages)


def _stream(n: int, tokens: int, sms: int) -> LinearConfig:
    """Tiles of up to 128 tokens; two small programs per multiprocessor, or one with many tokens."""
    block_m = max(8, min(128, token_bucket(tokens)))
    if block_m <= 64:
        block_n, warps, stages = 64, 4, {8: 6, 16: 6, 32: 4, 64: 3}[block_m]
    else:
        block_n, warps, stages = 128, 8, 4
    tiles = -(-n // block_n) * -(-tokens // block_m)
    return LinearConfig("stream", block_n, block_m, 16 if tiles < 4 * sms else 1, warps, stages)


@lru_cache(maxsize=4096)
def linear_config(
    gpu: str, sms: int, bits: int, group_size: int, n: int, k: int, bucket: int, dtype: str
) -> LinearConfig:
    """The table's entry, or the heuristic's.

    Args:
        gpu: Device name as the driver tells it; "" for none.
        sms: Streaming multiprocessors of the device.
        bits: Bits per code.
        group_size: Group size of the format.
        n: out_features.
        k: in_features.
        bucket: `token_bucket` of the number of tokens.
        dtype: Of the activations, e.g. "bfloat16".
    """
    entry = load_table(gpu).get(table_key(bits, group_size, n, k, bucket, dtype)) if gpu else None
    return entry or heuristic(bits, n, k, bucket, dtype, sms, stream=STREAM_UNMEASURED)
