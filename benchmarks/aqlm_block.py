"""AQLM on one decoder block of an 8B shape: seconds of each phase, and what a whole model would take.

    python -m benchmarks.aqlm_block [--scheme 2x8] [--device cuda] [--tokens 32768] [--output FILE]

No checkpoint is needed: weights are random, with rows and columns spread as a trained model's are, and
the text's embeddings lie mostly in a subspace, so that inputs are correlated and a few channels large.
Every line is printed as soon as it is known, so that a run that is cut off still tells something.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine
from qcompiler.calibration import CalibrationSettings, calibrate, cut_blocks
from qcompiler.capture import ModelSource, capture
from qcompiler.kernels.formats import AdditiveSpec
from qcompiler.methods.base import get_method
from qcompiler.passes import PassManager, canonical_passes
from qcompiler.progress import Progress

VOCABULARY = 4096


class Lines(Progress):
    """Prints every note with the seconds since the start."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def note(self, message: str) -> None:
        """See `Progress.note`."""
        print(f"{time.perf_counter() - self.started:7.1f} s  {message}", flush=True)


def random_tensor(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The tensor of that name in a model that was never trained; the same at every call."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if len(shape) == 1:
        return 0.4 + 0.1 * randn(*shape).abs()
    rows, columns = shape
    if "embed" in name:
        # A subspace with a falling spectrum, noise, and one channel in a hundred ten times as large.
        rank = max(1, columns // 16)
        spectrum = torch.arange(1, rank + 1, device=device).float().rsqrt()
        values = (randn(rows, rank) * spectrum) @ randn(rank, columns) / spectrum.norm()
        values += 0.3 * randn(rows, columns)
        values[:, ::100] *= 10
        return 0.02 * values
    spread = (0.3 * randn(rows, 1)).exp() * (0.3 * randn(1, columns)).exp()
    return randn(rows, columns) * spread * columns**-0.5


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="2x8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--code-updates", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32, help="of the whole model")
    parser.add_argument("--output", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    """Fit the block and print."""
    args = parse_arguments()

    from transformers import LlamaConfig

    device, lines = torch.device(args.device), Lines()
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    graph = capture(ModelSource.from_config(config), torch.float32).graph
    PassManager(canonical_passes()).run(graph)
    shapes = {name: tensor.shape for name, tensor in graph.state_dict(keep_vars=True).items()}
    lines.note(f"captured; {args.scheme} on {name_of(device)}, {args.tokens} tokens")

    spec, method = AdditiveSpec.parse(args.scheme), get_method("aqlm")
    options = method.validate(
        {"scheme": args.scheme, "epochs": args.epochs, "beam": args.beam, "code_updates": args.code_updates}
    )
    windows, block = args.tokens // args.context, cut_blocks(graph)[1][0]
    specs = {linear.name: spec for linear in block.linears}
    predicted = method.block_seconds(block, specs, options, windows, args.context, device)  # type: ignore[attr-defined]
    lines.note(f"predicted: {listed(predicted)}, together {sum(predicted.values()):.1f} s")

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (args.tokens,), generator=generator).tolist()
    started = time.perf_counter()
    outcome = calibrate(
        graph,
        lambda name: random_tensor(name, shapes[name], device),
        text,
        method,  # type: ignore[arg-type]
        lambda *_: spec,
        CalibrationSettings(context=args.context, tokens=args.tokens),
        options=options,
        progress=lines,
        device=device,
    )
    whole = time.perf_counter() - started
    figures = outcome.blocks[block.name]
    lines.note(f"measured:  {listed(figures['phases'])}, together {figures['seconds']:.1f} s")
    lines.note(
        f"the block with its streams {whole:.1f} s; {args.layers} blocks {whole * args.layers / 60:.0f} min"
    )
    if device.type == "cuda":
        lines.note(f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    if args.output:
        settings: dict[str, Any] = {key: str(value) for key, value in vars(args).items() if key != "output"}
        result = {
            "machine": machine(args.device), "settings": settings, "predicted": predicted,
            "measured": figures,
            "seconds_with_streams": round(whole, 1),
            "peak_gpu_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def name_of(device: torch.device) -> str:
    """What the figures were taken on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def listed(phases: dict[str, float]) -> str:
    """Phases with their seconds."""
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())


if __name__ == "__main__":
    main()
