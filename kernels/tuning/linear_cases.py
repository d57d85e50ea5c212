"""The quantized linears that are timed: random weights of a format, how to run them, configurations to try.

`qrun tune` and `benchmarks/linear.py` choose among the same candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.formats import ADDITIVE, AFFINE, AdditiveSpec, AffineSpec, get_format
from qcompiler.kernels.formats.affine import num_groups
from qcompiler.kernels.formats.body_tail import BODY_TAIL, BodyTailSpec, in_blocks, tail_layout
from qcompiler.kernels.formats.int8_channel import INT8_CHANNEL, Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import LUT4, NESTED_BLOCK, Lut4Spec, num_blocks
from qcompiler.kernels.ops.linear_additive_slices import pack_slices
from qcompiler.kernels.ops.linear_affine_sides import pack_sides
from qcompiler.kernels.tuning.tables import LinearConfig, table_key, token_bucket

TUNED = (AffineSpec, BodyTailSpec, AdditiveSpec, Lut4Spec, Int8ChannelSpec)  # specs that a `Case` may have

Run = Callable[[torch.Tensor, LinearConfig | None], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A format with its settings.

    Attributes:
        name: As on the command line.
        spec: As the format takes it.
        dtype: Of the activations, float16 or bfloat16.
    """

    name: str
    spec: Any
    dtype: torch.dtype = torch.bfloat16

    def make(self, n: int, k: int, seed: int) -> dict[str, torch.Tensor]:
        """Random stored tensors of a weight [n, k] on the GPU."""
        generator = torch.Generator("cuda").manual_seed(seed)
        if isinstance(self.spec, AffineSpec):
            return _affine_weight(self.spec, n, k, generator)
        if isinstance(self.spec, BodyTailSpec):
            return _body_tail_weight(self.spec, n, k, generator)
        if isinstance(self.spec, AdditiveSpec):
            shape = (n, k // self.spec.group_size, self.spec.codebooks)
            codes = torch.randint(0, self.spec.codewords, shape, device="cuda", generator=generator)
            books = torch.randn(
                self.spec.codebooks, self.spec.codewords, self.spec.group_size, device="cuda",
                generator=generator,
            )  # fmt: skip
            return ADDITIVE.pack(self.spec, codes, books, torch.rand(n, device="cuda") + 0.5)
        if isinstance(self.spec, Lut4Spec):
            return _lut4_weight(self.spec, n, k, generator)
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda", generator=generator)
        return INT8_CHANNEL.pack(self.spec, codes, torch.rand(n, device="cuda") / 60 + 0.01)

    def dense(self, tensors: dict[str, torch.Tensor], k: int) -> torch.Tensor:
        """The weight in float32."""
        return get_format(self.spec.name).dequantize(self.spec, tensors, k, torch.float32)

    def key(self, n: int, k: int, tokens: int) -> str | None:
        """Key of the tuning table's entry; None where the launcher has no configurations."""
        dtype = str(self.dtype).removeprefix("torch.")
        if isinstance(self.spec, AffineSpec):
            return table_key(self.spec.bits, self.spec.group_size, n, k, tokens, dtype)
        if isinstance(self.spec, BodyTailSpec):
            body = f"affine-b{self.spec.bits}-g{self.spec.group_size}"
            return f"linear_body_tail/{body}/n{n}-k{k}/m{token_bucket(tokens)}/{dtype}"
        if isinstance(self.spec, AdditiveSpec):
            scheme = f"{self.spec.scheme}-g{self.spec.group_size}"
            return f"linear_additive/{scheme}/n{n}-k{k}/m{token_bucket(tokens)}/{dtype}"
        if isinstance(self.spec, Lut4Spec):
            start = f"linear_lut4/{self.spec.quant_type}-b{self.spec.block_size}"
        else:
            start = f"linear_{'int8' if self.spec.outlier_threshold is None else 'llm_int8'}/int8_channel"
        return f"{start}/n{n}-k{k}/m{token_bucket(tokens)}/{dtype}"

    def runner(self, tensors: dict[str, torch.Tensor], k: int) -> Run:
        """A function of x and a configuration: None for the one that the launcher chooses."""
        if isinstance(self.spec, AffineSpec):
            from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton

            bits, group = self.spec.bits, self.spec.group_size
            sides = pack_sides(tensors["scales"], tensors["zeros"], bits, group, k, self.dtype)
            low, high = tensors["low"], tensors.get("high")
            return lambda x, config: linear_affine_sides_triton(
                x, low, high, sides, None, bits, group, k, config
            )
        kernel: Any
        _, (_, *rest) = get_format(self.spec.name).op_call(self.spec, None, tensors, None, k)
        if isinstance(self.spec, BodyTailSpec):
            from qcompiler.kernels.triton.linear.body_tail import linear_body_tail_triton

            kernel = linear_body_tail_triton
            return lambda x, config: kernel(x, *rest, config=config)
        if isinstance(self.spec, AdditiveSpec):
            return _additive_runner(tensors, rest)
        if isinstance(self.spec, Lut4Spec):
            from qcompiler.kernels.triton.linear.lut4 import linear_lut4_triton

            kernel = linear_lut4_triton
            return lambda x, config: kernel(x, *rest, config=config)
        if self.spec.outlier_threshold is None:
            from qcompiler.kernels.triton.linear.int8 import linear_int8_triton

            kernel = linear_int8_triton
            return lambda x, config: kernel(x, *rest, config=config)
        from qcompiler.kernels.triton.linear.llm_int8 import linear_llm_int8_triton

        kernel = linear_llm_int8_triton
        return lambda x, config: kernel(x, *rest, config=config)


def _additive_runner(tensors: dict[str, torch.Tensor], arguments: list[Any]) -> Run:
    """As a GPU provider runs it: a 16-bit codebook is rounded to int8 first."""
    from qcompiler.kernels.triton.linear.additive import linear_additive_slices_triton, linear_additive_triton

    kernel: Callable[..., torch.Tensor] = linear_additive_triton
    if tuple(tensors["codebooks"].shape) != (1, 1, 65536, 8):
        return lambda x, config: kernel(x, *arguments, config=config)
    packed = pack_slices(tensors["codebooks"])
    codes, _, scales, rows, *rest = arguments
    held = (codes, *packed.values(), scales, rows, *rest)
    slices: Callable[..., torch.Tensor] = linear_additive_slices_triton
    return lambda x, config: slices(x, *held, config=config)


def _affine_weight(spec: AffineSpec, n: int, k: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    groups = num_groups(spec.group_size, k)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    scales = (torch.rand(n, groups, device="cuda", generator=generator) + 0.5) / 2**spec.bits
    zeros = 2 ** (spec.bits - 1) + torch.randn(n, groups, device="cuda", generator=generator)
    return AFFINE.pack(spec, codes, scales, zeros)


def _lut4_weight(spec: Lut4Spec, n: int, k: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    blocks = num_blocks(spec.block_size, n, k)
    if not spec.double_quant:
        return LUT4.pack(spec, codes, torch.rand(blocks, device="cuda", generator=generator) + 0.5)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda", generator=generator)
    nested = torch.rand(-(-blocks // NESTED_BLOCK), device="cuda", generator=generator)
    return LUT4.pack(spec, codes, absmax, nested, torch.full((), 1.5, device="cuda"))


def _body_tail_weight(
    spec: BodyTailSpec, n: int, k: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A random body with a random tail in every slot, made some rows at a time."""
    _, slots, block = tail_layout(spec, k)
    parts = []
    for start in range(0, n, 4096):
        rows = min(4096, n - start)
        body = _affine_weight(spec.body, rows, k, generator)
        score = in_blocks(torch.rand(rows, k, device="cuda", generator=generator) + 1, block)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen = chosen.scatter_(2, score.topk(slots, dim=2).indices, True).flatten(1)[:, :k]
        tail = torch.randn(rows, k, device="cuda", generator=generator)
        parts.append(BODY_TAIL.pack(spec, body, tail, chosen))
    return BODY_TAIL.concat(spec, parts)


def parse_case(name: str) -> Case:
    """A case by its name: b4-g64, nf4, fp4, eetq, llm-int8, aqlm-2x8, tail-b3-f0.005 and the like."""
    if name in ("nf4", "fp4"):
        return Case(name, Lut4Spec(name, 64, True))
    if name == "eetq":
        return Case(name, Int8ChannelSpec(None))
    if name == "llm-int8":
        return Case(name, Int8ChannelSpec(6.0))
    if name.startswith("tail-b"):
        bits, fraction = name.removeprefix("tail-b").split("-f")
        return Case(name, BodyTailSpec(int(bits), 64, float(fraction)))
    if name.startswith("aqlm-"):
        return Case(name, AdditiveSpec.parse(name.removeprefix("aqlm-")))
    bits, group = name.removeprefix("b").split("-g")
    return Case(name, AffineSpec(int(bits), int(group)))


def candidates(case: Case, tokens: int, n: int, k: int, *, thorough: bool) -> list[LinearConfig]:
    """Configurations worth timing; few of them unless `thorough`."""
    if isinstance(case.spec, AdditiveSpec):
        return list(_additive(case.spec, tokens))
    if isinstance(case.spec, AffineSpec):
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
        streamed = _stream(case.spec, tokens, n) if hopper else ()
        return [*_affine(case.spec.bits, tokens, n, k, thorough), *streamed]
    if isinstance(case.spec, BodyTailSpec):
        return list(_body_tail(tokens))
    return list(_others(case, tokens, n, thorough))


def _splits(n: int, block_n: int, k: int, most: int) -> list[int]:
    """Divisions of K that leave a few programs per multiprocessor."""
    several = [s for s in (2, 4, 8) if s <= most and k // s >= 1024 and n // block_n * s <= 2048]
    return [1, *several]


def _affine(bits: int, tokens: int, n: int, k: int, thorough: bool) -> Iterator[LinearConfig]:
    bucket = token_bucket(tokens)
    if tokens <= 2:
        rows = (4, 8) if bits > 3 and tokens == 1 else (4,)
        for block_n in rows:
            for warps in (1, 2, 4):
                for split in _splits(n, block_n, k, 2):
                    yield LinearConfig("quads", block_n, bucket, split, warps, 1)
    if bits in (2, 3, 4, 6) and (2 if bits > 2 else 1) <= tokens <= 32:
        for block_n, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)):
            for split in _splits(n, block_n, k, 4):
                for stages in (2, 3, 4) if thorough else (3, 4):
                    yield LinearConfig("dots", block_n, max(8, bucket), split, warps, stages)
    if 1 < tokens <= 64:
        block_m = max(16, bucket)
        for block_n, warps in ((64, 4), (128, 4), (128, 8), *(((32, 2), (16, 1)) if thorough else ())):
            for split in _splits(n, block_n, k, 4):
                for stages in (2, 3, 4) if thorough else (2, 3):
                    yield LinearConfig("gemm", block_n, block_m, split, warps, stages)
    if tokens > 16:
        for block_n, block_m, warps in (
            (64, min(bucket, 64), 4), (128, min(bucket, 64), 4), (128, min(bucket, 128), 8),
            *(((128, min(bucket, 128), 4), (64, min(bucket, 128), 4)) if thorough else ()),
            *(((128, 256, 8), (64, 256, 4)) if tokens >= 256 else ()),
        ):  # fmt: skip
            if block_m > bucket:
                continue
            for split in _splits(n * -(-tokens // block_m), block_n, k, 4):
                for stages in (3, 4):
                    yield LinearConfig("wide", block_n, block_m, split, warps, stages)
    if tokens >= 128:
        yield LinearConfig("dense")
    if tokens >= 1024:
        # slices of 16 and 32 MB
        yield from (LinearConfig("dense", split_k=max(2, 2 * n * k >> bits)) for bits in (24, 25))


def _stream(spec: AffineSpec, tokens: int, n: int):
    """The streaming kernel, whole tiles or divided ones; block_n, block_m, warps and buffers of words."""
    if spec.bits > 4 or spec.group_size not in (64, 128, 256):
        return
    bucket = max(8, min(token_bucket(tokens), 128))
    tiles = {
        8: ((64, 8, 4, 6),), 16: ((64, 16, 4, 6), (128, 16, 8, 8)), 32: ((64, 32, 4, 4), (128, 32, 8, 6)),
        64: ((64, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3)), 128: ((128, 128, 8, 4), (256, 128, 8, 2)),
    }  # fmt: skip
    for block_n, block_m, warps, buffers in tiles[bucket]:
        count = -(-n // block_n) * -(-tokens // block_m)
        for split in (1, 2, 3, 4, 16) if count < 1024 else (1,):
            yield LinearConfig("stream", block_n, block_m, split, warps, buffers)


def _additive(spec: AdditiveSpec, tokens: int) -> Iterator[LinearConfig]:
    if tokens <= 64 and spec.group_size == 8 and spec.bits in (8, 12):
        for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            for split in (1, 2, 4, 6, 8, 12, 16):
                yield LinearConfig("shared", block_n, max(8, token_bucket(tokens)), split, warps, 1)
    elif tokens <= 32 and spec.group_size == 8 and spec.scheme == "1x16":
        for block_n, warps in ((128, 8), (256, 8), (256, 16)):
            for split in (1, 2, 3, 4):
                yield LinearConfig("shared", block_n, max(8, token_bucket(tokens)), split, warps, 1)
    if tokens <= 4:
        yield LinearConfig("gemv")
    if tokens > 1:
        yield LinearConfig("gemm")
    if tokens >= 32:
        yield LinearConfig("dense")


def _body_tail(tokens: int) -> Iterator[LinearConfig]:
    if tokens <= 64:
        for block_n, warps in ((64, 4), (128, 4), (128, 8)):
            for split in (1, 2, 4, 8):
                for stages in (2, 3, 4):
                    yield LinearConfig("gemm", block_n, max(8, token_bucket(tokens)), split, warps, stages)
    else:
        yield LinearConfig("gemm", 128, 128, 1, 8, 2)
        yield LinearConfig("dense")
        if tokens <= 512:
            yield LinearConfig("gemm", 128, 64, 1, 8, 3)
    if tokens <= 2:
        for block_n in (16, 32):
            for warps in (4, 8):
                for split in (1, 2, 4):
                    yield LinearConfig("gemv", block_n, 1, split, warps, 2)


def _others(case: Case, tokens: int, n: int, thorough: bool) -> Iterator[LinearConfig]:
    if tokens <= 4:
        for block_n in (8, 16, 32):
            for warps in (2, 4, 8):
                for split in (1, 2, 4):
                    if split == 1 or n // block_n * split <= 2048:
                        yield LinearConfig("gemv", block_n, 1, split, warps, 3)
    else:
        block_m = min(128, max(16, token_bucket(tokens)))
        for block_n, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (2, 3, 4):
                for split in (1, 2, 4) if tokens <= 64 and case.name != "llm-int8" else (1,):
                    yield LinearConfig("gemm", block_n, block_m, split, warps, stages)
        if tokens >= 256 and case.name == "llm-int8":
            yield LinearConfig("gemm", 128, 256, 1, 8, 3)
        if tokens >= 128 and case.name != "llm-int8":
            yield LinearConfig("dense")
