"""Which kernel with which tile sizes: a measured table per GPU model where there is one, else a heuristic.

A table is `<gpu>.json` beside this file, `<gpu>` the device name in lower case
with underscores: {"schema": 1, "gpu": name, "measured_with": {...}, "entries":
{key: config}}. A key names op, format, shape and token bucket, e.g.
"linear_affine/affine-b4-g64/n4096-k4096/m16/bfloat16". Nothing is tuned while
serving; `benchmarks/linear.py --tune` writes tables.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import ArtifactError

_FOLDER = Path(__file__).parent
KINDS = ("gemv", "quads", "gemm", "wide", "dense", "shared")


@dataclass(frozen=True)
class LinearConfig:
    """How one linear runs.

    Args:
        kind: "gemv" or "quads" (float32 units), "gemm" or "wide" (tensor cores, fused, few or many tokens),
            "shared" (tensor cores, codebooks in shared memory), or "dense" (dequantize, library matmul).
        block_n: Output channels per program.
        block_m: Tokens per program.
        split_k: Programs that share one output tile along in_features.
        num_warps: Warps per program.
        num_stages: Pipeline depth.
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


@lru_cache(maxsize=16)
def load_table(gpu: str, folder: Path = _FOLDER) -> dict[str, LinearConfig]:
    """Entries measured on a GPU model; empty when nobody measured there.

    Raises:
        ArtifactError: The file is not a table of this schema.
    """
    path = table_path(gpu, folder)
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1:
            raise ArtifactError(f"{path.name} has schema {data['schema']}, not 1.")
        return {key: LinearConfig(**entry) for key, entry in data["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} is not a tuning table: {error}.") from error


def heuristic(bits: int, n: int, k: int, tokens: int, dtype: str, sms: int) -> LinearConfig:
    """A sane configuration where nothing was measured, in the pattern of what was measured on an H100.

    One or two tokens run on the float32 units; up to 512 on tensor cores with the weight dequantized in
    registers, for many of them one plane at a time beside a large tile of tokens; beyond that the weight is
    written out once. float32 activations never use tensor cores, which would round them.
    """
    bucket = token_bucket(tokens)
    if dtype == "float32":
        if tokens > 4:
            return LinearConfig("dense")
        kind, block_n, block_m, warps, stages = "gemv", max(16, 64 // bucket), bucket, 4, 2
    elif tokens > 512:
        return LinearConfig("dense")
    elif tokens <= 2:
        kind, block_n, block_m, warps, stages = "quads", 8 if bits > 3 and tokens == 1 else 4, bucket, 2, 1
    elif tokens <= 64:
        kind, block_n, block_m, warps, stages = "gemm", 64, max(16, bucket), 4, 3
    else:
        kind, block_n, block_m, warps, stages = "wide", 128, 128, 8, 3
    programs = -(-n // block_n) * -(-tokens // block_m)
    # Fill the SMs about twice over, but keep at least 1024 codes of K per program.
    split = max(1, min(2 * sms // programs, k // 1024, 8))
    return LinearConfig(kind, block_n, block_m, split, warps, stages)


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
    return entry or heuristic(bits, n, k, bucket, dtype, sms)
