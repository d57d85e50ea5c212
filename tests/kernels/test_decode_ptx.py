"""The PTX that decodes 4- and 8-bit codes on a GPU, run by a small interpreter here: it needs no GPU."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from qcompiler.kernels.formats.lut4 import table

pytest.importorskip("triton")
from qcompiler.kernels.triton.linear.int8_kernels import PAIRS_BFLOAT16, PAIRS_FLOAT16
from qcompiler.kernels.triton.linear.lut4_codes import decode_asm


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _half2(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int64).to(torch.uint32).view(dtype)


def _word(pair: torch.Tensor) -> int:
    return int(pair.view(torch.uint32).to(torch.int64))


def _prmt(a: int, b: int, select: int) -> int:
    data = (a | b << 32).to_bytes(8, "little")
    assert not select & 0x8888, "a selector with its top bit set replicates signs"
    return int.from_bytes(bytes(data[select >> 4 * i & 7] for i in range(4)), "little")


def run(asm: str, outputs: int, word: int) -> list[int]:
    """Registers $0 … of one block; $<outputs> is the input word."""
    registers = {f"${outputs}": word}

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return int(name, 0) if name[0].isdigit() else registers[name]

    for op, operands in re.findall(r"^\s*([a-z][\w.]*) ([^;{}]+);", asm.replace(";", ";\n"), re.MULTILINE):
        target, *names = [part.strip() for part in operands.split(",")]
        given = [value(name) for name in names]
        kind = op.split(".")[0]
        if kind == "prmt":
            registers[target] = _prmt(given[0], given[1], given[2] & 0xFFFF)
        elif op == "sub.f32":
            registers[target] = _bits(_float(given[0]) - _float(given[1]))
        elif op == "sub.rn.f16x2":
            registers[target] = _word(_half2(given[0], torch.float16) - _half2(given[1], torch.float16))
        elif op == "cvt.rn.bf16x2.f32":  # the second operand goes to the low half
            registers[target] = _word(torch.tensor([_float(given[1]), _float(given[0])]).bfloat16())
        else:
            simple = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__, "shr": int.__rshift__}
            registers[target] = given[0] if kind == "mov" else simple[kind](*given)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_eight_codes_of_a_word_become_their_table_values(quant_type, dtype):
    asm = decode_asm(quant_type, dtype)
    values = table(quant_type).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for codes in torch.randint(0, 16, (64, 8), generator=generator).tolist():
        data = bytes(codes[2 * i] << 4 | codes[2 * i + 1] for i in range(4))
        pairs = run(asm, 4, int.from_bytes(data, "little"))
        decoded = torch.cat([_half2(pair, dtype) for pair in pairs])
        assert torch.equal(decoded.view(torch.int16), values[codes].view(torch.int16))


@pytest.mark.parametrize(("asm", "dtype"), [(PAIRS_BFLOAT16, torch.bfloat16), (PAIRS_FLOAT16, torch.float16)])
def test_every_signed_byte_becomes_its_value(asm, dtype):
    for start in range(-128, 128, 4):
        codes = torch.arange(start, start + 4, dtype=torch.int8)
        pairs = run(asm, 2, int.from_bytes(codes.numpy().tobytes(), "little"))
        assert torch.equal(torch.cat([_half2(pair, dtype) for pair in pairs]), codes.to(dtype))
