"""Quality of every method and bit width on trained models; writes the tables of docs/quality.md.

    python benchmarks/quality.py --models DIR --text FILE

Each model's decoder linears are replaced by their dequantized weights (output head and embedding
untouched) and run in fp32 by transformers over the first tokens of the text. Figures go to
benchmarks/results/quality-<model>.json, and from there between the markers of docs/quality.md.
`hqq package` is the hqq package itself with its scales and zeros stored as fp16, as ours are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qcompiler.kernels.formats.affine import AFFINE, BITS, AffineSpec
from qcompiler.methods.base import get_method
from qcompiler.quality import Quality, QualityMeter, windows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCUMENT = ROOT / "docs/quality.md"
GROUP_SIZE = 64
METHODS = ("rtn", "hqq", "hqq reference", "hqq package")
WANTED = {4: 0.88, 3: 0.83, 2: 0.60}

Quantizer = Callable[[str, Tensor], Tensor]


def quantizer(method: str, bits: int) -> Quantizer:
    """Function of a weight's name and values giving the values that would be stored."""
    if method == "hqq package":
        return package_quantizer(bits)
    name, _, solver = method.partition(" ")
    found = get_method(name)
    spec = found.resolve_spec(bits, GROUP_SIZE)
    options = {"solver": solver} if solver else {}

    def quantize(name: str, weight: Tensor) -> Tensor:
        tensors = found.quantize(weight, spec, options, name=name)
        return AFFINE.dequantize(spec, tensors, weight.shape[1], torch.float32)

    return quantize


def package_quantizer(bits: int) -> Quantizer:
    from hqq.core.quantize import Quantizer as Package

    def quantize(_: str, weight: Tensor) -> Tensor:
        codes, meta = Package.quantize(
            weight,
            nbits=bits,
            channel_wise=True,
            group_size=GROUP_SIZE,
            optimize=True,
            round_zero=bits == 4,
            axis=1,
            bitpack=False,
            compute_dtype=torch.float32,
            device="cpu",
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        return ((codes - zero) * scale).reshape(weight.shape)

    return quantize


class Bench:
    """A model, its text and the logits of the original."""

    def __init__(self, folder: Path, text: Path, tokens: int, context: int):
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        self.windows = [torch.tensor(window) for window in windows(ids, context, tokens)]
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        self.weights = {name: module.weight.detach().clone() for name, module in self.linears.items()}
        self.original = [self.logits(window) for window in self.windows]
        self.seen: dict[bytes, Quality] = {}

    @torch.inference_mode()
    def logits(self, window: Tensor) -> Tensor:
        """Logits [tokens - 1, vocabulary] of all positions that have a next token."""
        return self.model(window[None]).logits[0, :-1]

    def measure(self, method: str, bits: int) -> dict[str, object]:
        """Quantize, run and compare; `seconds` are those of quantizing (packing included) alone."""
        quantize = quantizer(method, bits)
        seconds = 0.0
        digest = hashlib.sha256()
        for name, module in self.linears.items():
            start = time.perf_counter()
            restored = quantize(name, self.weights[name])
            seconds += time.perf_counter() - start
            module.weight.data = restored
            digest.update(restored.contiguous().numpy().data)
        return {
            "method": method,
            "bits": bits,
            "bits_per_weight": self.bits_per_weight(bits),
            "seconds": seconds,
            **self.quality(digest.digest()).to_json(),
        }

    def quality(self, digest: bytes) -> Quality:
        """Figures of the weights in place; equal weights, told by their digest, are run once."""
        if digest not in self.seen:
            meter = QualityMeter()
            for window, original in zip(self.windows, self.original, strict=True):
                meter.update(original, self.logits(window), window[1:])
            self.seen[digest] = meter.result()
        return self.seen[digest]

    def bits_per_weight(self, bits: int) -> float:
        """Everything stored for the linears over the number of their weights."""
        spec = AffineSpec(bits, GROUP_SIZE)
        shapes = [weight.shape for weight in self.weights.values()]
        return 8 * sum(AFFINE.nbytes(spec, *shape) for shape in shapes) / sum(n * k for n, k in shapes)


def table(result: dict) -> str:
    rows = result["rows"]
    first = rows[0]
    lines = [
        f"Original perplexity {first['perplexity_original']:.3f}; {first['tokens']} scored tokens in "
        f"{first['windows']} windows.",
        "",
        "| bits | method | bits per weight | perplexity | KL, nats per token | same top-1 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(table_row, rows)])


def table_row(row: dict) -> str:
    change = 100 * (row["perplexity"] / row["perplexity_original"] - 1)
    cells = [
        row["bits"],
        row["method"],
        f"{row['bits_per_weight']:.3f}",
        f"{row['perplexity']:.3f} ({change:+.2f} %)",
        f"{row['kl_mean']:.5f} ± {row['kl_se']:.5f}",
        f"{100 * row['top1_agreement']:.2f} %",
        f"{row['seconds']:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def ratios(results: list[dict]) -> str:
    lines = [
        "| bits | wanted, at most | " + " | ".join(result["model"] for result in results) + " |",
        "|---|---|" + "---|" * len(results),
    ]
    for bits in sorted(BITS, reverse=True):
        cells = []
        for result in results:
            kl = {row["method"]: row["kl_mean"] for row in result["rows"] if row["bits"] == bits}
            cells.append(f"{kl['hqq'] / kl['hqq package']:.3f}")
        lines.append(f"| {bits} | {WANTED.get(bits, '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_between(name: str, body: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, rest = text.split(begin)
    DOCUMENT.write_text(f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def path(model: str) -> Path:
    return RESULTS / f"quality-{model}.json"


def load(model: str) -> dict:
    return json.loads(path(model).read_text(encoding="utf-8"))


def is_complete(model: str) -> bool:
    return path(model).exists() and {row["bits"] for row in load(model)["rows"]} == set(BITS)


def store(settings: dict, rows: list[dict]) -> None:
    """Write rows beside those of other widths that were measured under the same settings."""
    kept: list[dict] = []
    if path(settings["model"]).exists():
        earlier = load(settings["model"])
        if {key: value for key, value in earlier.items() if key != "rows"} == settings:
            measured = {(row["method"], row["bits"]) for row in rows}
            kept = [row for row in earlier["rows"] if (row["method"], row["bits"]) not in measured]
    everything = sorted(kept + rows, key=lambda row: (-row["bits"], METHODS.index(row["method"])))
    RESULTS.mkdir(parents=True, exist_ok=True)
    path(settings["model"]).write_text(
        json.dumps({**settings, "rows": everything}, indent=1) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the model folders")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--names", nargs="+", default=["tiny-llama", "small-llama"])
    parser.add_argument("--bits", nargs="+", type=int, default=sorted(BITS, reverse=True))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables-only", action="store_true", help="rewrite the tables from the JSON files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in [] if args.tables_only else args.names:
        bench = Bench(args.models / name, args.text, args.tokens, args.context)
        settings = {
            "model": name,
            "text": args.text.name,
            "tokens": args.tokens,
            "context": args.context,
            "group_size": GROUP_SIZE,
            "threads": args.threads,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        }
        for bits in args.bits:
            rows = [bench.measure(method, bits) for method in METHODS]
            for row in rows:
                print(name, bits, row["method"], f"KL {row['kl_mean']:.5f}", file=sys.stderr)
            store(settings, rows)
    complete = [name for name in ("tiny-llama", "small-llama") if is_complete(name)]
    for name in complete:
        write_between(name, table(load(name)))
    write_between("ratios", ratios([load(name) for name in complete]))


if __name__ == "__main__":
    main()
