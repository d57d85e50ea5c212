"""Codes of a quantized KV cache as floats; the layout of the words is told in `formats/kv_cache.py`.

Words stay 16 bits wide until they are in the registers where the matrix unit
wants the keys or values: two neighbouring words fill a 32-bit register, and a
plane of both becomes a pair of 16-bit floats there, by or-ing the codes into
the mantissa of a power of two and subtracting it. That is what the assembly
does; COMPILED=False gives the same values in plain Triton, as float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def scale_words(scales: torch.Tensor) -> torch.Tensor:
    """Scales as kernels read them: one 4-byte element per token and head [pages, page_size, heads]."""
    return scales if scales.dim() == 3 else scales.view(torch.int32).squeeze(-1)


# Per 16-bit float: (0x43 or 0x64: 128 or 1024 with an empty mantissa), each twice in a register.
_ONE = {"bf16": 0x3F803F80, "fp16": 0x3C003C00}
_MAGIC = {"bf16": 0x43004300, "fp16": 0x64006400}
_MINUS_MAGIC = {"bf16": 0xC300C300, "fp16": 0xE400E400}


def plane_assembly(fmt: str, plane: int, half: str, raw: bool = False) -> str:
    """PTX that turns plane `plane` of a pair of words $1 into a pair of floats $0.

    Args:
        fmt: "int8", "int4" or "fp8".
        plane: Which plane.
        half: "bf16" or "fp16".
        raw: Leave `raw_offset` in the codes of int4.
    """
    lines = ["{", ".reg .b32 w, a, b, one;", f"mov.b32 one, {_ONE[half]:#x};"]
    pair = f"{half.replace('fp', 'f')}x2"
    if fmt == "int4" and raw:
        lines += [f"shr.u32 w, $1, {4 * plane};", f"lop3.b32 $0, w, 0x000f000f, {_MAGIC[half]:#x}, 0xEA;"]
    elif fmt == "int4":
        # magic + code, less magic
        lines += [
            f"shr.u32 w, $1, {4 * plane};",
            f"lop3.b32 a, w, 0x000f000f, {_MAGIC[half]:#x}, 0xEA;",
            f"mov.b32 b, {_MINUS_MAGIC[half]:#x};",
            f"fma.rn.{pair} $0, a, one, b;",
        ]
    elif fmt == "int8" and half == "bf16":
        # Seven bits fit the mantissa: 128 + low bits, less 128 or, where the sign is set, 256.
        lines += [
            f"shr.u32 w, $1, {8 * plane};",
            "lop3.b32 a, w, 0x007f007f, 0x43004300, 0xEA;",
            "lop3.b32 b, w, 0x00800080, 0xc300c300, 0xEA;",
            f"fma.rn.{pair} $0, a, one, b;",
        ]
    elif fmt == "int8":
        # The flipped sign bit makes it 1024 + 128 + code.
        lines += [
            f"shr.u32 w, $1, {8 * plane};",
            "lop3.b32 a, w, 0x00ff00ff, 0x64806480, 0x6A;",
            "mov.b32 b, 0xe480e480;",
            f"fma.rn.{pair} $0, a, one, b;",
        ]
    else:
        # Sign, exponent and mantissa moved to their places; the exponents' biases differ by 120 or 8.
        up = 4 if half == "bf16" else 7
        grow = 0x7B807B80 if half == "bf16" else 0x5C005C00
        lines += [
            f"shr.u32 w, $1, {8 * plane};",
            f"shl.b32 a, w, {up};",
            f"and.b32 a, a, {0x007F007F << up:#x};",
            "shl.b32 b, w, 8;",
            "lop3.b32 a, b, 0x80008000, a, 0xEA;",
            f"mov.b32 one, {grow:#x};",
            "mov.b32 b, 0x80008000;",
            f"fma.rn.{pair} $0, a, one, b;",
        ]
    return " ".join([*lines, "}"])


_assembly = triton.constexpr_function(plane_assembly)


@triton.constexpr_function
def raw_offset(fmt: str, dtype: tl.dtype, compiled: bool) -> float:
    """What RAW planes have too much, which saves its subtraction where a row's low value can take it up."""
    if fmt != "int4" or not compiled or dtype == tl.float32:
        return 0.0
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.jit
def plane(
    words,
    j: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPILED: tl.constexpr,
    RAW: tl.constexpr = False,
):
    """Plane j of words int16 as floats: DTYPE, or float32 where that is asked for or nothing is COMPILED.

    RAW: plus `raw_offset`.
    """
    if COMPILED and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _assembly(FORMAT, j, "bf16", RAW), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif COMPILED and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _assembly(FORMAT, j, "fp16", RAW), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        wide = words.to(tl.int32)
        if FORMAT == "int4":
            return ((wide >> (4 * j)) & 15).to(tl.float32)
        elif FORMAT == "int8":
            return ((wide << (24 - 8 * j)) >> 24).to(tl.float32)
        else:
            byte = (wide >> (8 * j)) & 255
            bits = ((byte & 128) << 24) | ((byte & 127) << 20)
            return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def all_planes(
    words, FORMAT: tl.constexpr, DTYPE: tl.constexpr, COMPILED: tl.constexpr, RAW: tl.constexpr = False
):
    """[rows, W] words as floats [rows, planes · W], one plane after the other; RAW as in `plane`."""
    if FORMAT == "int4":
        # planes 0 and 1 and planes 2 and 3 differ in the last dimension
        p0 = plane(words, 0, FORMAT, DTYPE, COMPILED, RAW)
        p1 = plane(words, 1, FORMAT, DTYPE, COMPILED, RAW)
        p2 = plane(words, 2, FORMAT, DTYPE, COMPILED, RAW)
        p3 = plane(words, 3, FORMAT, DTYPE, COMPILED, RAW)
        first = tl.join(p0, p2)
        second = tl.join(p1, p3)
        both = tl.permute(tl.join(first, second), (0, 2, 3, 1))
        return tl.reshape(both, (words.shape[0], 4 * words.shape[1]))
    else:
        both = tl.join(plane(words, 0, FORMAT, DTYPE, COMPILED), plane(words, 1, FORMAT, DTYPE, COMPILED))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def scale_of(stored, FORMAT: tl.constexpr):
    """Scales float32 of what is stored per token and head: float32, or int4's pair of float16 in an int32."""
    if FORMAT == "int4":
        return (stored & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def low_of(stored):
    """The value of code 0 of int4, float32."""
    return (stored >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_words(at, exists, W: tl.constexpr, BLOCK_W: tl.constexpr, MASKED: tl.constexpr):
    """Words [keys, BLOCK_W] of the rows that `at` points to, zero for those that do not exist."""
    e = tl.arange(0, BLOCK_W)
    if MASKED:
        return tl.load(at[:, None] + e[None, :], mask=exists[:, None] & (e[None, :] < W), other=0)
    elif W == BLOCK_W:
        return tl.load(at[:, None] + e[None, :])
    else:
        return tl.load(at[:, None] + e[None, :], mask=e[None, :] < W, other=0)


@triton.jit
def load_scales(k_at, v_at, exists, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """What is stored per key for keys and values, by one load of [keys, COLUMNS]; COLUMNS is 2 or 4.

    A load with fewer elements than there are threads would be repeated by Triton in the layout of the scores,
    with dozens of copies per thread; columns repeat until it has enough.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    at = tl.where(column % 2 == 0, k_at[:, None], v_at[:, None])
    if MASKED:
        stored = tl.load(at, mask=exists[:, None] & (column >= 0), other=0)
    else:
        stored = tl.load(at)
    if COLUMNS == 4:
        k_stored, v_stored = tl.split(tl.reshape(stored, (stored.shape[0], 2, 2)))
        k_stored, _ = tl.split(k_stored)
        v_stored, _ = tl.split(v_stored)
    else:
        k_stored, v_stored = tl.split(stored)
    return k_stored, v_stored
