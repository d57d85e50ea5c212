"""A small interpreter of compiled kernels: PTX, all threads of a program in lockstep, on the CPU.

It shows what Triton's own interpreter cannot: kernels written in Gluon or with addresses of their own in
shared memory. It knows the instructions that these kernels compile to and refuses others. Every access is
held against the buffers that were given; branches must be taken by all threads alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_SPECIAL = re.compile(r"%(tid|ctaid)\.([xyz])|%laneid")
_BASE = 1 << 20  # of the first buffer; buffers lie a megabyte apart at least


class Machine:
    """One kernel with its arguments.

    Args:
        text: PTX of one kernel.
        arguments: Of its parameters, as they stand in the PTX: arrays for pointers (written in place) and
            integers.
        threads: Of one program.
        shared: Bytes of shared memory.
    """

    def __init__(self, text: str, arguments: Sequence[np.ndarray | int], threads: int, shared: int):
        self.code, self.labels = _parse(text)
        self.threads = threads
        self.buffers: list[tuple[int, np.ndarray]] = []
        self.parameters: list[int] = []
        at = _BASE
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                self.buffers.append((at, argument.reshape(-1).view(np.uint8)))
                self.parameters.append(at)
                at += (argument.nbytes + (2 << 20)) >> 20 << 20
            else:
                self.parameters.append(argument)
        self.parameters += [0, 0]  # scratch buffers that these kernels have no use for
        self.shared = np.full(shared, 0xFF, dtype=np.uint8)

    def run(self, grid: tuple[int, int]) -> None:
        """Run all programs of a grid, one after the other."""
        for y in range(grid[1]):
            for x in range(grid[0]):
                self.shared[:] = 0xFF
                self._program(x, y)

    def _program(self, x: int, y: int) -> None:
        lanes = np.arange(self.threads, dtype=np.uint64)
        self.registers = {
            "%tid.x": lanes,
            "%laneid": lanes % 32,
            "%ctaid.x": np.full_like(lanes, x),
            "%ctaid.y": np.full_like(lanes, y),
            "global_smem": np.zeros_like(lanes),
        }
        at = 0
        while True:
            guard, op, operands = self.code[at]
            at += 1
            active = np.ones(self.threads, dtype=bool)
            if guard:
                active = self.registers[guard.lstrip("!")].astype(bool) ^ guard.startswith("!")
            name = op.split(".")[0]
            if name == "ret":
                return
            if name == "bra":
                assert active.all() or not active.any(), "threads part ways"
                at = self.labels[operands[0]] if active.all() else at
            elif name not in ("bar", "bar.sync"):
                self._step(op, operands, active)

    def _step(self, op: str, operands: list[str], active: np.ndarray) -> None:
        parts = op.split(".")
        kind = parts[0]
        if kind in ("ld", "st") and parts[1] != "param":
            self._memory(parts, operands, active)
        elif kind == "ld":
            number = int(re.search(r"_param_(\d+)", operands[1])[1])
            self._set(operands[0], np.full(self.threads, self.parameters[number] % 2**64, np.uint64), active)
        elif kind == "cp":
            if parts[2] in ("cg", "ca"):
                data = self._read("global", self._address(operands[1]), 16, active)
                self._write("shared", self._address(operands[0]), data, active)
        elif kind == "mma":
            self._mma(operands, np.float16 if "f16.f16" in op else None)
        elif kind == "mov" and operands[0].startswith("{"):
            low, high = operands[0].strip("{} ").split(",")
            value = self._get(operands[1])
            self._set(low.strip(), value & 0xFFFF, active)
            self._set(high.strip(), value >> np.uint64(16) & np.uint64(0xFFFF), active)
        elif kind == "mov" and operands[1].startswith("{"):
            low, high = (self._get(part.strip()) for part in operands[1].strip("{} ").split(","))
            self._set(operands[0], low | high << np.uint64(16), active)
        else:
            given = [self._get(operand) for operand in operands[1:]]
            self._set(operands[0], _compute(kind, parts[1:], given), active)

    def _get(self, operand: str) -> np.ndarray:
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith(("0f", "0F")):
            return np.full(self.threads, int(operand[2:], 16), np.uint64)
        return np.full(self.threads, int(operand.rstrip("U"), 0) % 2**64, np.uint64)

    def _set(self, register: str, value: np.ndarray, active: np.ndarray) -> None:
        old = self.registers.get(register, np.zeros(self.threads, np.uint64))
        self.registers[register] = np.where(active, value.astype(np.uint64), old)

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._get(base.strip()) + np.uint64(int(offset or 0))

    def _memory(self, parts: list[str], operands: list[str], active: np.ndarray) -> None:
        size = int(parts[-1].lstrip("bus")) // 8
        count = int(parts[2][1:]) if parts[2].startswith("v") else 1
        pointer, registers = operands if parts[0] == "st" else operands[::-1]
        names = [name.strip() for name in registers.strip("{} ").split(",")]
        assert len(names) == count
        at = self._address(pointer)
        assert not (at[active] % np.uint64(size * count)).any(), f"{'.'.join(parts)} is not aligned"
        if parts[0] == "ld":
            data = self._read(parts[1], at, size * count, active)
            for name, value in zip(names, np.split(data, count, axis=1), strict=True):
                self._set(name, _join(value), active)
        else:
            bits = [
                (self._get(name)[:, None] >> (8 * np.arange(size, dtype=np.uint64))) & 0xFF for name in names
            ]
            self._write(parts[1], at, np.concatenate(bits, axis=1).astype(np.uint8), active)

    def _where(self, space: str, at: np.ndarray, size: int, active: np.ndarray):
        """Each active thread's buffer and the offsets of its bytes there."""
        for base, data in [(0, self.shared)] if space == "shared" else self.buffers:
            offset = at.astype(np.int64) - base
            mine = (
                active & (offset >= 0) & (offset < (1 << 20 if space == "shared" else data.size + (1 << 18)))
            )
            if mine.any():
                assert (offset[mine] + size <= data.size).all(), f"{space} access past the end of a buffer"
                yield data, mine, offset[mine][:, None] + np.arange(size)
                active = active & ~mine
        assert not active.any(), f"{space} access outside of all buffers"

    def _read(self, space: str, at: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        found = np.zeros((self.threads, size), np.uint8)
        for data, mine, offsets in self._where(space, at, size, active):
            found[mine] = data[offsets]
        return found

    def _write(self, space: str, at: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
        for data, mine, offsets in self._where(space, at, values.shape[1], active):
            data[offsets] = values[mine]

    def _mma(self, operands: list[str], half: type | None) -> None:
        """m16n8k16: for each warp d [16, 8] = a [16, 16] · b [16, 8] + c."""
        groups = [[self._get(r.strip()) for r in part.strip("{} ").split(",")] for part in operands]
        lane = np.arange(32)
        row, pair = lane // 4, lane % 4 * 2
        results = [np.zeros(self.threads, np.uint64) for _ in range(4)]
        for warp in range(0, self.threads, 32):
            mine = slice(warp, warp + 32)
            a, b, c = (
                np.zeros((16, 16), np.float32),
                np.zeros((16, 8), np.float32),
                np.zeros((16, 8), np.float32),
            )
            for i, register in enumerate(groups[1]):
                for half_of in (0, 1):
                    value = _half(register[mine] >> np.uint64(16 * half_of), half)
                    a[row + i % 2 * 8, pair + half_of + i // 2 * 8] = value
            for i, register in enumerate(groups[2]):
                for half_of in (0, 1):
                    b[pair + half_of + i * 8, row] = _half(register[mine] >> np.uint64(16 * half_of), half)
            for i, register in enumerate(groups[3]):
                c[row + i // 2 * 8, pair + i % 2] = _float(register[mine])
            d = a @ b + c
            for i in range(4):
                results[i][mine] = _bits(d[row + i // 2 * 8, pair + i % 2])
        for name, value in zip(operands[0].strip("{} ").split(","), results, strict=True):
            self._set(name.strip(), value, np.ones(self.threads, bool))


def _parse(text: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """(guard, op, operands) of each instruction, and where labels stand."""
    code: list[tuple[str, str, list[str]]] = []
    labels: dict[str, int] = {}
    body = text[text.index("\n{", text.index(".entry")) + 2 :].split("\n}")[0]
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
            continue
        for statement in re.sub(r"^\{ (?=\.reg)|\}$", "", line).split(";"):
            found = re.match(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement.strip())
            if found is None or statement.strip().startswith("."):
                continue
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
            code.append((found[1] or "", found[2], operands))
    return code, labels


def _join(data: np.ndarray) -> np.ndarray:
    shifts = 8 * np.arange(data.shape[1], dtype=np.uint64)
    return (data.astype(np.uint64) << shifts).sum(axis=1, dtype=np.uint64)


def _float(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)


def _half(bits: np.ndarray, half: type | None) -> np.ndarray:
    """float16 (half given) or bfloat16 as float32."""
    low = (bits & np.uint64(0xFFFF)).astype(np.uint16)
    return low.view(half).astype(np.float32) if half else _float(low.astype(np.uint64) << np.uint64(16))


def _to_half(values: np.ndarray, kind: str) -> np.ndarray:
    if kind.startswith("f16"):
        return values.astype(np.float16).view(np.uint16).astype(np.uint64)
    bits = _bits(values)
    return (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)


def _signed(value: np.ndarray, width: int) -> np.ndarray:
    wide = (value << np.uint64(64 - width)).view(np.int64)
    return wide >> (64 - width)


def _compute(kind: str, types: list[str], given: list[np.ndarray]) -> np.ndarray:
    last = types[-1]
    width = int(re.search(r"\d+$", last)[0]) if re.search(r"\d+$", last) else 1
    mask = np.uint64(2**width - 1)
    if kind == "cvt":
        return _convert(types, given)
    if kind == "prmt":
        data = given[0] & np.uint64(0xFFFFFFFF) | given[1] << np.uint64(32)
        chosen = [given[2] >> np.uint64(4 * i) & np.uint64(7) for i in range(4)]
        assert not (given[2] & np.uint64(0x8888)).any(), "a selector with its top bit set replicates signs"
        return _join(np.stack([(data >> (8 * c)) & np.uint64(0xFF) for c in chosen], axis=1))
    if kind == "shf":  # of two words, the first the lower; wrapping
        wide, count = given[0] & mask | given[1] << np.uint64(32), given[2] & np.uint64(31)
        return (wide << count >> np.uint64(32) if types[0] == "l" else wide >> count) & mask
    if last in ("f16x2", "bf16x2"):
        half = np.float16 if last == "f16x2" else None
        halves = []
        for shift in (0, 16):
            left, right = (_half(value >> np.uint64(shift), half) for value in given)
            halves.append(_to_half({"sub": left - right, "add": left + right}[kind], last))
        return halves[0] | halves[1] << np.uint64(16)
    if last == "f32":
        a, b, *c = (_float(value) for value in given)
        return _bits({"mul": lambda: a * b, "add": lambda: a + b, "fma": lambda: a * b + c[0]}[kind]())
    if last == "pred":
        return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[kind](*given)
    if kind == "selp":
        return np.where(given[2].astype(bool), given[0], given[1])
    if kind == "bfe":
        return (given[0] & mask) >> given[1] & ((np.uint64(1) << given[2]) - np.uint64(1))
    if kind in ("and", "or", "xor", "not", "mov"):
        plain = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
        return (plain[kind](*given) if kind in plain else given[0]) & mask
    signed = last.startswith("s") or (kind in ("setp", "min", "max", "div", "rem") and last.startswith("s"))
    values = [_signed(v, width) if signed else (v & mask).view(np.int64) for v in given]
    if "wide" in types and kind == "mad":
        values[2] = given[2].view(np.int64)
    if kind in ("shl", "shr"):
        values[1] = (given[1] & np.uint64(63)).view(np.int64)
    table = {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
        "mad": lambda a, b, c: a * b + c, "min": np.minimum, "max": np.maximum,
        "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
        "div": lambda a, b: np.trunc(a / b).astype(np.int64), "rem": lambda a, b: np.fmod(a, b),
    }  # fmt: skip
    if kind == "setp":
        compare = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
                   "eq": np.equal, "ne": np.not_equal}  # fmt: skip
        return compare[types[0]](*values).astype(np.uint64)
    result = table[kind](*values).view(np.uint64)
    return result & np.uint64(2 ** min(64, 2 * width if "wide" in types else width) - 1)


def _convert(types: list[str], given: list[np.ndarray]) -> np.ndarray:
    *_, target, source = types
    if target in ("f16x2", "bf16x2"):  # the second operand goes to the low half
        high, low = (_to_half(_float(value), target) for value in given)
        return low | high << np.uint64(16)
    if target in ("f16", "bf16"):
        return _to_half(_float(given[0]), target)
    if source in ("f16", "bf16"):
        return _bits(_half(given[0], np.float16 if source == "f16" else None))
    from_width, to_width = int(source[1:]), int(target[1:])
    value = (
        _signed(given[0], from_width).view(np.uint64)
        if source[0] == "s"
        else given[0] & np.uint64(2**from_width - 1)
    )
    return value & np.uint64(2**to_width - 1)
