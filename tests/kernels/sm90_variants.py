"""Compile the op kernels for sm_90 with the tiles their launchers choose; prints one JSON object per variant.

Run as a script without TRITON_INTERPRET: inside the interpreter `triton.jit` gives nothing that compiles.
"""

from __future__ import annotations

import json
import sys

from offline import compile_sm90

from qcompiler.kernels.triton import activation, attention, grouped_linear, kv_append, norms, rotary
from qcompiler.kernels.triton.attention_decode import combine_kernel, decode_kernel
from qcompiler.kernels.triton.attention_prefill import prefill_kernel

_INT32 = ("table_ptr", "query_start_ptr", "seq_lens_ptr", "key_start_ptr", "offsets_ptr")
_FLOAT32 = ("partial_ptr", "lse_ptr")
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def argument_types(kernel, element):
    types = {}
    for name in kernel.arg_names:
        if name in _INT32:
            types[name] = "*i32"
        elif name in _FLOAT32:
            types[name] = "*fp32"
        elif name == "slots_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = f"*{element}"
        elif name in ("scale", "softcap", "eps", "offset"):
            types[name] = "fp32"
        elif "stride" in name or name in ("inputs", "outputs", "columns"):
            types[name] = "i32:16"
        else:
            types[name] = "i32"
    return types


def attention_constants(kernel, dim, element, tile, group, options):
    tile_heads = min(group, tile.block_m)
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": attention._padded(dim), "BLOCK_DV": attention._padded(dim),
        "GROUP": group, "TILE_HEADS": tile_heads, "TILE_TOKENS": tile.block_m // tile_heads, "KV_HEADS": 8,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SEQUENCES_P2": 64, "SPLITS": 16,
        "CAUSAL": True, "WINDOW": 0, "CHUNK": 0, "SOFTCAP": False, "SINKS": False, "PAGED": True,
        "PAGE_SIZE": 16, "PRECISION": "ieee" if element == "fp32" else "tf32",
    } | options  # fmt: skip
    if not constants["SINKS"]:
        constants["sinks_ptr"] = None
    if not constants["PAGED"]:
        constants["table_ptr"] = None
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def attention_variants():
    rich = {"WINDOW": 1024, "SOFTCAP": True, "SINKS": True}
    for element, dim, options in (
        ("bf16", 64, rich), ("bf16", 128, {}), ("bf16", 128, rich), ("bf16", 256, {}),
        ("bf16", 128, {"PAGED": False, "CAUSAL": False}), ("fp32", 128, {}),
    ):  # fmt: skip
        tile = attention.prefill_tile(4096, dim, _ITEMSIZE[element])
        yield (
            "prefill",
            prefill_kernel,
            element,
            tile.num_warps,
            tile.num_stages,
            attention_constants(prefill_kernel, dim, element, tile, 4, options),
        )
    for element, dim, options in (
        ("bf16", 64, {}),
        ("bf16", 128, rich),
        ("bf16", 256, {}),
        ("fp32", 128, {}),
    ):
        tile = attention.decode_tile(4, dim, _ITEMSIZE[element])
        yield (
            "decode",
            decode_kernel,
            element,
            tile.num_warps,
            tile.num_stages,
            attention_constants(decode_kernel, dim, element, tile, 4, options),
        )
    yield "combine", combine_kernel, "bf16", 4, 2, {"HEADS": 32, "DV": 128, "BLOCK_DV": 128, "SPLITS": 32}


def other_variants():
    for columns in (128, 8192):
        block, block_rows, warps = norms._tile(columns)
        shape = {"COLUMNS": columns, "BLOCK_ROWS": block_rows, "BLOCK": block, "x_inner": 1, "WEIGHT": True}
        rms = shape | {"residual_inner": 1, "CAST_FIRST": True, "ADD": True}
        yield "rms_norm", norms.rms_norm_kernel, "bf16", warps, 2, rms
        yield "layer_norm", norms.layer_norm_kernel, "bf16", warps, 2, shape | {"BIAS": True}
    for name in ("silu", "gelu"):
        gated = {"gate_inner": 1, "up_inner": 1, "BLOCK": 1024, "ACTIVATION": name}
        yield name, activation.gated_kernel, "bf16", 4, 2, gated
    append = {"HEADS": 8, "D": 128, "DV": 128, "PAGE_SIZE": 16, "BLOCK": 1024}
    yield "kv_append", kv_append.kv_append_kernel, "bf16", 4, 2, append
    for interleaved in (False, True):
        rotation = {
            "HEADS": 32, "ROTATED": 64, "D": 128, "BLOCK_HEADS": 32, "BLOCK_HALF": 32, "BLOCK_REST": 64,
            "INTERLEAVED": interleaved,
        }  # fmt: skip
        yield "rotary", rotary.rotary_kernel, "bf16", 4, 2, rotation
    for rows, transposed in ((8, False), (16384, True)):
        block_m, block_n, block_k, warps, stages = grouped_linear.tile(rows, 8, 2)
        grouped = {
            "EXPERTS": 8, "EXPERTS_P2": 16, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "EVEN_K": True, "BIAS": True, "PRECISION": "tf32",
            "stride_w_out" if transposed else "stride_w_in": 1,
        }  # fmt: skip
        yield "grouped_linear", grouped_linear.grouped_linear_kernel, "bf16", warps, stages, grouped


def main():
    for name, kernel, element, warps, stages, constants in (*attention_variants(), *other_variants()):
        types = {k: t for k, t in argument_types(kernel, element).items() if k not in constants}
        compiled = compile_sm90(kernel, types, constants, num_warps=warps, num_stages=stages)
        report = {
            "kernel": name,
            "element": element,
            "columns": constants.get("COLUMNS"),
            "registers": compiled.registers,
            "spill_bytes": compiled.spill_bytes,
            "shared_bytes": compiled.shared_bytes,
            "wgmma": compiled.ttgir.count("warp_group_dot "),
            "narrow_loads": any(f"LDG.E.{width}" in compiled.sass for width in ("U8", "U16")),
        }
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
