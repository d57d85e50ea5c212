"""Compile the lut4 and int8 linears for sm_90 with the tiles their launchers choose; one JSON object each.

Run as a script without TRITON_INTERPRET: inside the interpreter `triton.jit` gives nothing that compiles.
"""

from __future__ import annotations

import json
import sys

import torch
import triton.language as tl
from offline import compile_sm90

from qcompiler.kernels.triton.grouped.expert_rows import expert_tile
from qcompiler.kernels.triton.grouped.int8 import grouped_linear_int8_kernel
from qcompiler.kernels.triton.grouped.lut4 import grouped_linear_lut4_kernel
from qcompiler.kernels.triton.linear.int8_kernels import (
    PAIRS_BFLOAT16,
    PAIRS_FLOAT16,
    dequantize_int8_kernel,
    linear_int8_gemm,
    linear_int8_gemv,
)
from qcompiler.kernels.triton.linear.launch import heuristic
from qcompiler.kernels.triton.linear.llm_int8 import (
    linear_llm_int8_gemm,
    list_columns_kernel,
    quantize_rows_kernel,
    round_rows_kernel,
)
from qcompiler.kernels.triton.linear.lut4_codes import decode_asm
from qcompiler.kernels.triton.linear.lut4_kernels import (
    dequantize_lut4_kernel,
    linear_lut4_gemm,
    linear_lut4_gemv,
)
from qcompiler.kernels.tuning.tables import LinearConfig

N, K, SMS = 4096, 14336, 132
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HALF = {"bf16": tl.bfloat16, "fp16": tl.float16}
_POINTERS = {
    "values": "*fp32", "nested_absmax": "*fp32", "nested_offset": "*fp32", "steps": "*fp32",
    "part_rows": "*i32", "scales": "*fp32", "absmax": "*fp32", "x_absmax": "*fp32", "columns": "*i32",
    "codes": "*i8", "x_codes": "*i8", "flags": "*i8", "limit": "fp32",
}  # fmt: skip


def types(kernel, element, constants, **given):
    found = {}
    for name in kernel.arg_names:
        if name == "x" and constants.get("PAIRS"):
            found[name] = "*i32"
        elif name in ("x", "bias", "out"):
            found[name] = f"*{element}"
        elif name in ("K", "x_stride", "x_codes_stride", "codes_stride", "N"):
            found[name] = "i32:16"
        else:
            found[name] = _POINTERS.get(name, "i32")
    return found | given


def gemv(element):
    return {"UNITS": 64, "PAIRS": True, "HALF": _HALF[element], "COMPILED": True, "EVEN_K": True}


def lut4_variants():
    for double in (True, False):
        weight = {"BLOCK": 64, "CROSS": False, "DOUBLE": double, "PARTS": 3 if double else 0}
        given = {"units": "*i32", "absmax": "*u8" if double else "*fp32"}
        for tokens in (1, 16, 64, 512):
            for element in ("bf16", "fp16"):
                config = heuristic(N, K, tokens, "bfloat16", SMS)
                constants = weight | {"PER": 8, "BN": config.block_n, "SPLIT": 1, "HAS_BIAS": True}
                if config.kind == "gemv":
                    yield linear_lut4_gemv, element, given, constants | gemv(element), config
                else:
                    decode = decode_asm("nf4", _TORCH[element])
                    tile = {"UNITS": 16, "BM": config.block_m, "EVEN_K": True, "HALF": _HALF[element]}
                    yield linear_lut4_gemm, element, given, constants | tile | {"DECODE": decode}, config
        config = heuristic(N, K, 4096, "bfloat16", SMS)
        yield dequantize_lut4_kernel, "bf16", given, weight | {"PER": 8, "BN": 16, "UNITS": 32}, config


def int8_variants():
    for tokens in (1, 16, 64, 512):
        for element in ("bf16", "fp16"):
            config = heuristic(N, K, tokens, "bfloat16", SMS)
            constants = {"PER": 4, "BN": config.block_n, "SPLIT": 1, "HAS_BIAS": True}
            if config.kind == "gemv":
                yield linear_int8_gemv, element, {"units": "*i32"}, constants | gemv(element), config
            else:
                decode = PAIRS_BFLOAT16 if element == "bf16" else PAIRS_FLOAT16
                tile = {"UNITS": 32, "BM": config.block_m, "EVEN_K": True, "HALF": _HALF[element]}
                yield (
                    linear_int8_gemm,
                    element,
                    {"units": "*i32"},
                    constants | tile | {"DECODE": decode},
                    config,
                )
    yield dequantize_int8_kernel, "bf16", {}, {"BLOCK": 2048}, heuristic(N, K, 4096, "bfloat16", SMS)


def expert_variants():
    """Few tokens, many, float32 activations, and rows that are no whole words."""
    for rows, element, words, double in (
        (8, "bf16", True, True), (256, "fp16", True, True), (8192, "bf16", True, False),
        (64, "fp32", True, True), (8, "bf16", False, True),
    ):  # fmt: skip
        half = element != "fp32"
        block_n, block_m, warps, stages = expert_tile(rows, 8, 2 if half else 4)
        config = LinearConfig("gemm", block_n, block_m, 1, warps, stages)
        shared = {
            "EXPERTS": 8, "EXPERTS_P2": 16, "BN": block_n, "BM": block_m, "HAS_BIAS": True,
            "EVEN_K": words, "HALF": _HALF.get(element, tl.bfloat16),
        }  # fmt: skip
        given = {"offsets": "*i32"} | ({} if words else {"K": "i32"})
        int8_decode = PAIRS_BFLOAT16 if element == "bf16" else PAIRS_FLOAT16
        int8 = {"PER": 4 if words else 1, "UNITS": 32, "DECODE": int8_decode if half and words else ""}
        pointer = {"units": "*i32" if words else "*i8"}
        yield grouped_linear_int8_kernel, element, given | pointer, shared | int8, config
        lut4 = {
            "PER": 8 if words else 2, "UNITS": 16, "BLOCK": 64, "CROSS": not words, "DOUBLE": double,
            "DECODE": decode_asm("nf4", _TORCH[element]) if half and words else "",
        }  # fmt: skip
        pointers = {"units": "*i32" if words else "*u8", "absmax": "*u8" if double else "*fp32"}
        yield grouped_linear_lut4_kernel, element, given | pointers, shared | lut4, config


def llm_int8_variants():
    one = heuristic(N, K, 4096, "bfloat16", SMS)
    yield quantize_rows_kernel, "bf16", {}, {"BLOCK": 4096}, one
    yield list_columns_kernel, "bf16", {}, {"BLOCK": 4096}, one
    yield round_rows_kernel, "bf16", {"out": "*fp32"}, {"ROWS": 1, "BLOCK": 8192}, one
    for tokens in (16, 64, 512):
        for element in ("bf16", "fp16"):
            config = heuristic(N, K, tokens, "bfloat16", SMS)
            constants = {
                "BN": config.block_n, "BM": config.block_m, "BK": 128, "BO": 32, "EVEN_K": True,
                "HAS_BIAS": True, "HALF": _HALF[element],
            }  # fmt: skip
            yield linear_llm_int8_gemm, element, {}, constants, config


def main() -> None:
    for kernel, element, given, constants, config in (
        *lut4_variants(),
        *int8_variants(),
        *llm_int8_variants(),
        *expert_variants(),
    ):
        compiled = compile_sm90(
            kernel,
            types(kernel, element, constants, **given),
            constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        loop = compiled.loop()
        row = {
            "kernel": kernel.fn.__name__, "element": element, "bm": constants.get("BM"),
            "double": constants.get("DOUBLE"), "decoded": bool(constants.get("DECODE")),
            "registers": compiled.registers,
            "spill_bytes": compiled.spill_bytes, "shared_bytes": compiled.shared_bytes,
            "half_mma": compiled.sass.count("HGMMA"), "integer_mma": compiled.sass.count("IGMMA"),
            "loop": dict(loop),
        }  # fmt: skip
        print(json.dumps(row))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
