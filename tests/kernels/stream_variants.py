"""Compile the streaming GEMM for sm_90 with its launcher's rings; prints one JSON object per variant.

Run as a script without TRITON_INTERPRET: inside the interpreter Gluon has nothing that compiles.
"""

from __future__ import annotations

import json
import sys

from offline import compile_sm90
from triton.experimental.gluon import language as gl

from qcompiler.kernels.triton.linear.affine_stream import linear_affine_stream
from qcompiler.kernels.triton.linear.affine_stream_launch import registers, ring_sizes

# bits, groups per block, dtype, block_n, block_m, warps, word buffers
VARIANTS = [
    (4, 4, "bf16", 64, 16, 4, 6), (4, 4, "bf16", 64, 64, 4, 3), (4, 4, "bf16", 128, 128, 8, 4),
    (4, 2, "fp16", 128, 32, 8, 6), (3, 4, "bf16", 64, 16, 4, 4),
    (2, 1, "fp16", 64, 8, 4, 6),
]  # fmt: skip
ELEMENTS = {"bf16": gl.bfloat16, "fp16": gl.float16, "i32": gl.int32, "i16": gl.int16}


def descriptor(element, rows, columns):
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], ELEMENTS[element])
    return f"tensordesc<{element}[{rows}, {columns}],{layout!r}>"


def main():
    for bits, sides, element, block_n, block_m, warps, buffers in VARIANTS:
        width = 64 if bits == 4 else 32
        word_buffers, x_buffers, planes = ring_sizes(bits, block_n, block_m, buffers, 8 // warps)
        constants = {
            "BITS": bits, "SIDES": sides, "BN": block_n, "BM": block_m, "WS": word_buffers, "XS": x_buffers,
            "XP": planes, "BURST": 2 if element == "fp16" else 1,
            "HAS_BIAS": True, "HALF": ELEMENTS[element],
        }  # fmt: skip
        types = {
            "x_desc": descriptor(element, block_m, width),
            "word_desc": descriptor("i32", block_n, width // 2),
            "high_desc": descriptor("i16", block_n, width // 2),
            "side_desc": descriptor("i32", block_n, 4),
            "out": f"*{element}", "parts": "*fp32", "bias": f"*{element}", "N": "i32:16",
            **dict.fromkeys(("M", "tiles_m", "tiles", "blocks", "unit"), "i32"),
        }  # fmt: skip
        if bits != 3:
            constants["high_desc"] = None
        compiled = compile_sm90(
            linear_affine_stream, types, constants, num_warps=warps, maxnreg=registers(warps)
        )
        waits = [int(part[0], 0) for part in compiled.sass.split("DEPBAR.LE gsb0, 0x")[1:]]
        report = {
            "variant": [bits, sides, element, block_n, block_m, warps],
            "spill_bytes": compiled.spill_bytes,
            "shared_bytes": compiled.shared_bytes,
            "programs": 8 // warps,
            "products": compiled.sass.count("HGMMA"),
            "waits": waits,
            "stores": compiled.sass.count("STS.") + compiled.sass.count("STSM"),
        }
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
