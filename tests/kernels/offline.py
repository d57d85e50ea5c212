"""Compile Triton kernels for a GPU that is not there, and read what the compiler made of them.

`compile_variants` does so in a process of its own, because a process in which
Triton interprets cannot compile.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One kernel with its settings.

    Args:
        kernel: "module:function".
        types: See `compile_sm90`.
        constants: Values of the constexpr arguments; a Triton dtype is written as "tl.bfloat16".
        num_warps: Warps per program.
        num_stages: Pipeline depth.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Report:
    """Resources of one compiled variant; `loop` counts the opcodes of its longest innermost loop.

    `early` are the loads and stores before the wait for earlier kernels, empty too where none waits.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    layout_conversions: int
    loop: dict[str, int]
    early: list[str]


def compile_variants(variants: list[Variant]) -> list[Report]:
    """Compile each variant for an H100/H200 in one fresh process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(variant) for variant in variants]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Report(**report) for report in json.loads(done.stdout)]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel variant."""

    ttgir: str
    ptx: str
    sass: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    def loop(self) -> Counter[str]:
        """Instructions of the longest innermost loop, counted by opcode."""
        return Counter(name.split(".")[0] for name in self.loop_opcodes())

    def memory_before_wait(self) -> list[str]:
        """Loads and stores that stand before the wait for earlier kernels; all of them where none waits."""
        before = self.sass.partition("ACQBULK")[0]
        return re.findall(r"\b(?:LDG|LDGSTS|STG|ATOMG?|REDG?|UBLKCP|UTMALDG)\b", before)

    def loop_opcodes(self) -> list[str]:
        """Opcodes with their modifiers of the longest innermost loop, in order."""
        code = [
            (int(address, 16), body.strip())
            for address, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", self.sass)
        ]
        spans = []
        for address, body in code:
            jump = re.match(
                r"(?:@!?U?P\w+\s+)?BRA(?:\.\w+)*\s+(?:U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))", body
            )
            if jump and jump[1] and int(jump[1], 16) < address:
                spans.append((int(jump[1], 16), address))
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        if not inner:
            return []
        start, end = max(inner, key=lambda span: span[1] - span[0])
        bodies = [body for address, body in code if start <= address <= end]
        return [re.sub(r"^@!?U?P\w+\s+", "", body).split()[0] for body in bodies]


def compile_sm90(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile `kernel` for an H100/H200.

    Args:
        kernel: A `triton.jit` or `gluon.jit` function, taken outside of the interpreter.
        types: Triton type of each runtime argument, e.g. "*bf16" or "i32". Pointers, and integers written
            as "i32:16", are taken to be divisible by 16.
        constants: Values of the constexpr arguments; with `types` they name every argument.
        num_warps: Warps per program.
        num_stages: Pipeline depth.
        maxnreg: Registers per thread, shared out again among warps that are specialized.

    Returns:
        The intermediate and machine code with its resources.
    """
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
        else:
            signature[name] = types[name].removesuffix(":16")
            if types[name].startswith("*") or types[name].endswith(":16"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source_class = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_class(kernel, signature, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?SHARED:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of resources:\n{usage}")
    registers, stack, _, local = map(int, found.groups())
    return Compiled(
        compiled.asm["ttgir"], compiled.asm["ptx"], sass, registers, stack + local, compiled.metadata.shared
    )


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run(
        [str(_TOOLS / "cuobjdump"), *arguments], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def _report(variant: Variant) -> Report:
    module, function = variant.kernel.split(":")
    constants = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for name, value in variant.constants.items()
    }
    compiled = compile_sm90(
        getattr(importlib.import_module(module), function),
        variant.types,
        constants,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )
    return Report(
        compiled.registers,
        compiled.spill_bytes,
        compiled.shared_bytes,
        compiled.ttgir.count("ttg.convert_layout"),
        dict(compiled.loop()),
        compiled.memory_before_wait() if "ACQBULK" in compiled.sass else [],
    )


if __name__ == "__main__":
    requests = [Variant(**request) for request in json.load(sys.stdin)]
    json.dump([asdict(_report(request)) for request in requests], sys.stdout)
