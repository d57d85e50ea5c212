"""Compile the op kernels for sm_90 with the tiles their launchers choose; prints one JSON object per variant.

Run as a script without TRITON_INTERPRET: inside the interpreter `triton.jit` gives nothing that compiles.
"""

from __future__ import annotations

import json
import re
import sys

import triton.language as tl
from offline import compile_sm90

from qcompiler.kernels.formats.kv_cache import kv_format, smallest_scale
from qcompiler.kernels.triton import activation, norms, rotary
from qcompiler.kernels.triton.attention import kv_append, kv_append_quantized, kv_dequantize, rotary_kv_append
from qcompiler.kernels.triton.attention import launch as attention
from qcompiler.kernels.triton.attention import launch_quantized as attention_quantized
from qcompiler.kernels.triton.attention.decode import combine_kernel, decode_kernel
from qcompiler.kernels.triton.attention.decode_quantized import decode_quantized_kernel
from qcompiler.kernels.triton.attention.prefill import prefill_kernel
from qcompiler.kernels.triton.attention.prefill_quantized import prefill_quantized_kernel
from qcompiler.kernels.triton.grouped import linear as grouped_linear

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


def quantized_types(kernel, element, fmt):
    """Types of the kernels over a quantized cache: codes int16, scales of 4 bytes."""
    types = argument_types(kernel, element)
    appended = "k_pages_ptr" in types
    words = {"words_ptr"} | ({"k_pages_ptr", "v_pages_ptr"} if appended else {"k_ptr", "v_ptr"})
    for name in types:
        if name.endswith("scales_ptr"):
            types[name] = "*i32" if fmt == "int4" else "*fp32"
        elif name in words:
            types[name] = "*i16"
    return types


def quantized_variants():
    rich = {"WINDOW": 1024, "SOFTCAP": True, "SINKS": True}
    for fmt, element, dim, page_size, options in (
        ("int4", "bf16", 128, 128, {}), ("int4", "fp16", 64, 16, {}), ("int8", "bf16", 128, 128, rich),
        ("int8", "bf16", 256, 64, {}), ("fp8", "fp16", 80, 64, {}),
    ):  # fmt: skip
        exact = element == "fp32"
        chosen = kv_format(fmt)
        words = chosen.words(dim)
        block = max(attention.next_power_of_2(words), attention.MIN_DOT)
        half = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[element]
        shape = {
            "FORMAT": fmt, "PLANES": chosen.planes, "WK": words, "WV": words, "BLOCK_WK": block,
            "BLOCK_WV": block, "PAGE_SIZE": page_size, "K_DTYPE": half,
            "V_DTYPE": half if exact else tl.bfloat16, "COMPILED": True,
            "stride_ks_slot": 1, "stride_vs_slot": 1,
        } | options  # fmt: skip
        for name, kernel, tile in (
            (
                "prefill_quantized",
                prefill_quantized_kernel,
                attention_quantized.prefill_quantized_tile(4096, chosen.planes * block, exact),
            ),
            (
                "decode_quantized",
                decode_quantized_kernel,
                attention_quantized.decode_quantized_tile(4, chosen.planes * block, page_size, exact),
            ),
        ):
            columns = {"COLUMNS": attention_quantized.scale_columns(tile)}
            constants = attention_constants(kernel, dim, element, tile, 4, shape | columns)
            yield name, kernel, element, tile.num_warps, tile.num_stages, constants
        if dim != 128:
            continue
        made = {
            "FORMAT": fmt, "HEADS": 8, "D": dim, "W": words, "BLOCK_W": block, "BLOCK_P": 32,
            "PAGE_SIZE": page_size, "stride_s_slot": 1,
        }  # fmt: skip
        yield "dequantize_pages", kv_dequantize.dequantize_pages_kernel, element, 4, 2, made
        append = {
            "FORMAT": fmt, "PLANES": chosen.planes, "HEADS": 8, "BLOCK_H": 8, "D": dim, "DV": dim,
            "WK": words, "WV": words, "BLOCK_WK": attention.next_power_of_2(words),
            "BLOCK_WV": attention.next_power_of_2(words), "LEAST": smallest_scale(fmt),
            "PAGE_SIZE": page_size, "PDL": 2,
        }  # fmt: skip
        yield "kv_append_quantized", kv_append_quantized.kv_append_quantized_kernel, element, 4, 2, append
        rotating = append | {
            "HEADS": 32, "KV_HEADS": 8, "ROTATED": dim, "BLOCK_HEADS": 8, "BLOCK_HALF": dim // 2,
            "BLOCK_REST": 1, "INTERLEAVED": False,
        }  # fmt: skip
        kernel = rotary_kv_append.rotary_kv_append_quantized_kernel
        del rotating["BLOCK_H"]
        yield "rotary_kv_append_quantized", kernel, element, 4, 2, rotating


def attention_constants(kernel, dim, element, tile, group, options):
    tile_heads = min(group, tile.block_m)
    constants = {
        "D": dim, "DV": dim, "BLOCK_D": attention.padded(dim), "BLOCK_DV": attention.padded(dim),
        "GROUP": group, "TILE_HEADS": tile_heads, "TILE_TOKENS": tile.block_m // tile_heads, "KV_HEADS": 8,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SEQUENCES_P2": 64, "SPLIT": True, "PDL": 2,
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
        ("bf16", 64, rich), ("bf16", 128, {"PAGE_SIZE": 64}), ("bf16", 128, {}), ("bf16", 128, rich),
        ("bf16", 256, {}), ("bf16", 128, {"PAGED": False, "CAUSAL": False}), ("fp32", 128, {}),
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
        ("bf16", 128, {"PAGE_SIZE": 64}),
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
    combine = {"HEADS": 32, "DV": 128, "BLOCK_DV": 128, "SPLITS_P2": 64, "PDL": 2}
    yield "combine", combine_kernel, "bf16", 4, 2, combine


def other_variants():
    for columns in (128, 8192):
        block, block_rows, warps = norms._tile(columns)
        shape = {
            "COLUMNS": columns,
            "BLOCK_ROWS": block_rows,
            "BLOCK": block,
            "x_inner": 1,
            "WEIGHT": True,
            "PDL": 2,
        }
        rms = shape | {"residual_inner": 1, "CAST_FIRST": True, "ADD": True}
        yield "rms_norm", norms.rms_norm_kernel, "bf16", warps, 2, rms
        yield "layer_norm", norms.layer_norm_kernel, "bf16", warps, 2, shape | {"BIAS": True}
    for name in ("silu", "gelu"):
        gated = {"gate_inner": 1, "up_inner": 1, "BLOCK": 1024, "ACTIVATION": name, "PDL": 2}
        yield name, activation.gated_kernel, "bf16", 4, 2, gated
    append = {"HEADS": 8, "D": 128, "DV": 128, "PAGE_SIZE": 16, "BLOCK": 1024, "PDL": 2}
    yield "kv_append", kv_append.kv_append_kernel, "bf16", 4, 2, append
    for interleaved in (False, True):
        rotation = {
            "HEADS": 32, "ROTATED": 64, "D": 128, "BLOCK_HEADS": 32, "BLOCK_HALF": 32, "BLOCK_REST": 64,
            "INTERLEAVED": interleaved, "PDL": 2,
        }  # fmt: skip
        yield "rotary", rotary.rotary_kernel, "bf16", 4, 2, rotation
        appended = rotation | {"KV_HEADS": 8, "DV": 128, "BLOCK_HEADS": 8, "BLOCK_DV": 128, "PAGE_SIZE": 16}
        yield "rotary_kv_append", rotary_kv_append.rotary_kv_append_kernel, "bf16", 4, 2, appended
    for rows, transposed in ((8, False), (16384, True)):
        block_m, block_n, block_k, warps, stages = grouped_linear.tile(rows, 8, 2)
        grouped = {
            "EXPERTS": 8, "EXPERTS_P2": 16, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
            "EVEN_K": True, "BIAS": True, "PRECISION": "tf32",
            "stride_w_out" if transposed else "stride_w_in": 1,
        }  # fmt: skip
        yield "grouped_linear", grouped_linear.grouped_linear_kernel, "bf16", warps, stages, grouped


def _buffers(ttgir):
    """How many tiles of keys or values each pipelined load of two dimensions holds."""
    return [int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", ttgir)]


def main():
    variants = (*attention_variants(), *quantized_variants(), *other_variants())
    for name, kernel, element, warps, stages, constants in variants:
        fmt = constants.get("FORMAT")
        types = argument_types(kernel, element) if fmt is None else quantized_types(kernel, element, fmt)
        types = {k: t for k, t in types.items() if k not in constants}
        compiled = compile_sm90(kernel, types, constants, num_warps=warps, num_stages=stages)
        report = {
            "kernel": name,
            "element": element,
            "columns": constants.get("COLUMNS"),
            "registers": compiled.registers,
            "spill_bytes": compiled.spill_bytes,
            "shared_bytes": compiled.shared_bytes,
            "wgmma": compiled.ttgir.count("warp_group_dot "),
            "fewest_buffers": min(_buffers(compiled.ttgir), default=0),
            "shared_stores": sum(compiled.loop()[op] for op in ("STS", "STSM")),
            "waits": "ACQBULK" in compiled.sass,
            "memory_before_wait": compiled.memory_before_wait(),
            "narrow_loads": any(f"LDG.E.{width}" in compiled.sass for width in ("U8", "U16")),
        }
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
