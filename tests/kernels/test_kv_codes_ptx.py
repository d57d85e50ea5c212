"""The PTX that turns codes of the KV cache into floats, run by a small interpreter: it needs no GPU."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.kernels.formats.kv_cache import KV_FORMATS, kv_format
from qcompiler.kernels.triton.attention.kv_codes import plane_assembly

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _pair(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int64).to(torch.uint32).view(dtype)


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


def run(asm: str, word: int, dtype: torch.dtype) -> torch.Tensor:
    """The pair of floats in $0 for the pair of words in $1."""
    registers = {"$1": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for op, operands in re.findall(r"([a-z][\w.]*) ([^;{}]+);", asm.replace(".reg .b32 w, a, b, one;", "")):
        target, *names = [part.strip() for part in operands.split(",")]
        given = [value(name) for name in names]
        if op == "lop3.b32":
            registers[target] = _lop3(*given)
        elif op.startswith("fma.rn"):
            a, b, c = (_pair(bits, dtype).double() for bits in given)
            registers[target] = int((a * b + c).to(dtype).view(torch.uint32).to(torch.int64))
        else:
            simple = {
                "mov.b32": lambda a: a,
                "shr.u32": lambda a, n: a >> n,
                "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
                "and.b32": lambda a, b: a & b,
            }
            registers[target] = simple[op](*given)
    return _pair(registers["$0"], dtype)


def every_word() -> list[int]:
    """Pairs of words in which every byte stands in every place."""
    bytes_ = torch.arange(256)
    rolled = torch.stack([bytes_.roll(n) for n in (0, 85, 131, 7)], dim=-1).to(torch.uint8)
    return rolled.view(torch.uint32).to(torch.int64).flatten().tolist()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_every_code_becomes_its_value(fmt, half):
    chosen, dtype = kv_format(fmt), HALVES[half]
    words = torch.tensor(every_word()).to(torch.uint32).view(torch.int16).view(-1, 2)
    scales = torch.tensor([1.0, 0.0]).half() if fmt == "int4" else torch.tensor(1.0)
    scales = scales.expand(words.shape[0], *scales.shape)
    values = chosen.dequantize(words, scales, 2 * chosen.planes).view(-1, chosen.planes, 2)
    for j in range(chosen.planes):
        asm = plane_assembly(fmt, j, half)
        found = torch.stack([run(asm, word, dtype) for word in every_word()]).view(-1, 2)
        wanted = values[:, j].to(dtype)
        finite = wanted.isfinite()  # E4M3 has a code of NaN, which quantizing never gives
        assert torch.equal(found[finite], wanted[finite])
        if fmt != "fp8":
            assert finite.all()


@pytest.mark.parametrize(("half", "offset"), [("bf16", 128), ("fp16", 1024)])
def test_raw_planes_are_the_codes_plus_an_offset(half, offset):
    dtype = HALVES[half]
    for word in every_word():
        for j in range(4):
            exact = run(plane_assembly("int4", j, half), word, dtype)
            assert torch.equal(run(plane_assembly("int4", j, half, True), word, dtype), exact + offset)
