"""The streaming GEMM: its assembly and its sums over shares of work anywhere, the kernel itself on Hopper."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from test_linear_affine_sides import prepared
from test_linear_affine_triton import DEVICE, assert_close

from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.kernels.triton.linear.affine_sides import linear_affine_sides_triton
from qcompiler.kernels.triton.linear.affine_stream_codes import decode_asm, plane_shift
from qcompiler.kernels.triton.linear.affine_stream_launch import ring_sizes, stream_takes, sum_parts
from qcompiler.kernels.tuning.tables import LinearConfig, heuristic

ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
    ),
]
_SCRIPT = Path(__file__).with_name("stream_on_gpu.py")
_RUNS = 9
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half2(bits: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int64).to(torch.uint32).view(dtype)


def word_of(pair: torch.Tensor) -> int:
    return int(pair.view(torch.uint32).to(torch.int64))


def run(asm: str, dtype: torch.dtype, arguments: list[int]) -> torch.Tensor:
    """The two halves of $0 after lop3 and fma instructions on $1 and so on."""
    registers = {f"${i + 1}": value for i, value in enumerate(arguments)}
    for op, operands in re.findall(r"(mov|lop3|fma)[\w.]* ([^;]+);", asm):
        target, *names = [part.strip() for part in operands.split(",")]
        given = [registers[name] if name in registers else int(name, 0) for name in names]
        if op == "mov":
            registers[target] = given[0]
        elif op == "lop3":
            assert given[3] == 0xEA, "(a & b) | c"
            registers[target] = given[0] & given[1] | given[2]
        else:
            a, b, c = (half2(value, dtype).double() for value in given)
            registers[target] = word_of((a * b + c).to(dtype))
    return half2(registers["$0"], dtype)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_of_every_plane_is_decoded_with_one_rounding(bits, half):
    dtype, spec = HALVES[half], AffineSpec(bits, 64)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (1, 256), dtype=torch.uint8, generator=generator)
    tensors = AFFINE.pack(spec, codes, torch.ones(1, 4), torch.zeros(1, 4))
    words = tensors["low"].shape[1]
    scale, offset = torch.tensor([0.37, -1.7]).to(dtype)
    for plane in range(256 // (2 * words)):
        for i in range(words):
            arguments = [int(tensors["low"][0, i]) >> plane_shift(bits, plane) & 0xFFFFFFFF]
            arguments += [word_of(side.expand(2).contiguous()) for side in (scale, offset)]
            if bits == 3:
                high = int(tensors["high"][0, i]) & 0xFFFF
                spread, left = high & 0xFF | (high & 0xFF00) << 8, 2 + 2 * (plane % 3) - plane
                arguments.append(spread << left if left >= 0 else spread >> -left)
            code = codes[0, 2 * words * plane + 2 * i : 2 * words * plane + 2 * i + 2].double()
            wanted = ((code - 2 ** (bits - 1)) * scale.double() + offset.double()).to(dtype)
            assert torch.equal(run(decode_asm(bits, plane, half), dtype, arguments), wanted)


@pytest.mark.parametrize(
    ("tokens", "rows", "blocks", "programs"),
    [(33, 249, 7, 10), (31, 184, 4, 17), (40, 105, 9, 16), (5, 70, 3, 6), (9, 64, 2, 2)],
)
def test_divided_tiles_are_summed_from_the_parts_of_all_their_programs(tokens, rows, blocks, programs):
    """The kernel's shares, done in torch: whole tiles go to the output, the others to parts."""
    bn, bm = 64, 16
    tiles_m, tiles_n = -(-tokens // bm), -(-rows // bn)
    steps = torch.randn(tiles_m * tiles_n * blocks, bm, bn, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(rows)
    wanted = steps.view(tiles_n, tiles_m, blocks, bm, bn).sum(2).permute(1, 2, 0, 3).reshape(tiles_m * bm, -1)
    wanted = wanted[:tokens, :rows] + bias
    out = torch.full((tokens, rows), float("nan"))
    parts = torch.full((2 * programs, bm, bn), float("nan"))
    for program in range(programs):
        step, end = (p * len(steps) // programs for p in (program, program + 1))
        while step < end:
            tile, first = divmod(step, blocks)
            last = min(blocks, first + end - step)
            total = steps[step : step + last - first].sum(0)
            if (first, last) == (0, blocks):
                m, n = tile % tiles_m * bm, tile // tiles_m * bn
                out[m : m + bm, n : n + bn] = total[: tokens - m, : rows - n] + bias[n : n + bn]
            else:
                parts[2 * program + (first == 0)] = total
            step += last - first
    parts, out, bias = (t.to(DEVICE) for t in (parts, out, bias))
    sum_parts[(tiles_m * tiles_n, 2)](
        parts, out, bias, tokens, rows, tiles_m, tiles_m * tiles_n, blocks, programs,
        BN=bn, BM=bm, BLOCK_M=8, HAS_BIAS=True, PDL=False,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("block_n", "block_m", "buffers", "per_sm"), [
    (64, 8, 6, 2), (64, 64, 3, 2), (128, 16, 6, 1), (128, 128, 4, 1), (256, 64, 2, 1),
])  # fmt: skip
def test_rings_fit_shared_memory_and_hold_two_buffers_of_x(bits, block_n, block_m, buffers, per_sm):
    words, x, planes = ring_sizes(bits, block_n, block_m, buffers, per_sm)
    width = 64 if bits == 4 else 32
    of_words = words * block_n * (width // 2 * (6 if bits == 3 else 4) + 16)
    assert of_words + x * planes * block_m * width * 2 <= 225 * 1024 // per_sm
    assert words == buffers
    assert x >= 2


def test_where_it_cannot_run_another_road_is_taken():
    arguments, wanted, size = prepared(4, 16, 24, 256, 3, torch.float16)
    x, low, high, sides, _, bits, group, _ = arguments
    assert not stream_takes(x, low, high, sides, bits, group, 16)
    config = LinearConfig("stream", 64, 16, 1, 4, 4)
    assert_close(linear_affine_sides_triton(*arguments, config=config), wanted, size)


@pytest.mark.parametrize("tokens", [3, 16, 100, 256, 5000])
def test_the_heuristic_chooses_tiles_whose_rings_fit(tokens):
    assert heuristic(4, 4096, 4096, tokens, "bfloat16", 132).kind != "stream"
    chosen = heuristic(4, 4096, 4096, tokens, "bfloat16", 132, stream=True)
    assert chosen.kind == "stream"
    assert chosen.block_n == 16 * chosen.num_warps
    assert chosen.block_m >= min(tokens, 128)
    per_sm = 8 // chosen.num_warps
    assert ring_sizes(4, chosen.block_n, chosen.block_m, chosen.num_stages, per_sm)[1] >= 2


def outcome(number):
    """What a line of `stream_on_gpu.RUNS` printed, and its exit status; in a process, which may hang."""
    command = [sys.executable, str(_SCRIPT), str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        text, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        text = process.communicate()[0] + b"\nkilled: it hung"
    return text.decode(), process.returncode


@pytest.mark.parametrize("number", [pytest.param(i, marks=ON_HOPPER) for i in range(_RUNS)])
def test_it_agrees_with_the_reference_and_with_itself(number):
    """Ragged sizes, poisoned memory, whole and divided tiles, bias or none, early launches or none."""
    text, code = outcome(number)
    assert code == 0, text[-3000:]
    reports = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert len(reports) >= 4
    assert [r for r in reports if not (r["takes"] and r["finite"] and r["error"] <= 1 and r["same"])] == []
