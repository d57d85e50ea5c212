"""Every benchmark of speed by name, with the arguments that its published figures are made with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A module of this folder that takes `--output FILE`.

    Attributes:
        name: As on the command line.
        summary: One line for the list.
        runs: Usual arguments; several runs add to the same file, or write files of their own.
        module: Where it differs from the name.
    """

    name: str
    summary: str
    runs: tuple[str, ...]
    module: str = ""

    def commands(self, results: str, work: str) -> list[list[str]]:
        """Arguments to Python of each run, with folders of results and of what is too large for memory."""
        return [
            ["-m", f"benchmarks.{self.module or self.name}", *run.format(results=results, work=work).split()]
            for run in self.runs
        ]


_70B = "10240x8192 8192x8192 57344x8192 8192x28672"
_FORMATS = "b2-g64 b3-g64 b8-g64 nf4 eetq llm-int8 tail-b3-f0.005 aqlm-2x8 aqlm-1x16"
_EVERY_M = "1 2 4 8 16 32 64 128 256 1024 4096"
BENCHMARKS = (
    Benchmark(
        "linear",
        "quantized linears by format, shape and tokens, beside cuBLAS and peers",
        (
            f"--cases b4-g64 --tokens {_EVERY_M} --output {{results}}/linear.json",
            f"--cases b4-g64 --shapes {_70B} --tokens 1 16 64 --output {{results}}/linear-70b.json",
            f"--cases {_FORMATS} --shapes 28672x4096 4096x14336 8192x28672 --tokens 1 16 64 "
            "--output {results}/linear-formats.json",
        ),
    ),
    Benchmark(
        "attention",
        "prefill and decode with plain and quantized caches, beside SDPA's flash and cuDNN",
        ("--output {results}/attention.json",),
    ),
    Benchmark(
        "model",
        "whole models by method: first token, prefill, decode by batch, memory, beside peers",
        (
            "--warm --output {results}/model.json",
            "--variants bf16 affine-4 affine-8 eetq --lm-head-bits 8 --peers --output {results}/model.json",
        ),
    ),
    Benchmark(
        "compile_speed",
        "the HQQ solver beside the hqq package; whole compilations from disk",
        ("--work {work} --output {results}/compile-speed.json",),
    ),
    Benchmark(
        "serve",
        "the server under load, beside the bare engine",
        ("--shape llama3-8b --variant affine-4 --output {results}/serve.json",),
    ),
    Benchmark(
        "backend",
        "torch.compile with our backend, beside inductor",
        ("--shape llama3-8b --layers 4 --output {results}/backend.json",),
    ),
    Benchmark(
        "aqlm_block",
        "calibrating one block of an 8B shape by AQLM",
        ("--output {results}/aqlm-block.json",),
    ),
)
