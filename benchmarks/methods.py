"""Quality of every method as `qcompile` reports it: one compilation per row, both models in fp32.

    python -m benchmarks.methods --models DIR --text FILE --calib-text FILE [--only MODEL] [--row "eetq 8"]

Writes benchmarks/results/methods-<model>.json and the tables between the markers of docs/quality.md;
with --row, rows that are not named stay as they were measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import RESULTS, write_between
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.methods.affine import AffineMethod, Groups, store
from qcompiler.methods.base import get_method, register_method
from qcompiler.options import CompileOptions
from qcompiler.pipeline import compile_model


@register_method
class SymmetricRounding(AffineMethod):
    """What NF4 is measured by: each block's absmax at code 7, the rest to the nearest of 15 even steps.

    Stored as affine with a zero point, which a format of its own would not need.
    """

    name = "symmetric"
    summary = "symmetric round to nearest, a yardstick"

    def solve_groups(self, values: torch.Tensor, spec: AffineSpec, importance: torch.Tensor | None) -> Groups:
        """See `AffineMethod.solve_groups`."""
        centre = float(2 ** (spec.bits - 1))
        absmax = values.abs().amax(dim=1, keepdim=True)
        scales, _ = store(absmax / (centre - 1), -absmax, absmax, spec)
        codes = (torch.round(values / scales) + centre).clamp_(1.0, 2 * centre - 1)
        return Groups(codes, scales, torch.full_like(scales, centre))


# name in the table, method, bits, options of the method
ROWS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("eetq 8", "eetq", 8, {}),
    ("bnb 8 (LLM.int8())", "bnb", 8, {}),
    ("bnb 4 nf4", "bnb", 4, {}),
    ("bnb 4 fp4", "bnb", 4, {"quant_type": "fp4"}),
    ("gptq 8 g64", "gptq", 8, {}),
    ("gptq 6 g64", "gptq", 6, {}),
    ("gptq 5 g64", "gptq", 5, {}),
    ("aqlm 4x8", "aqlm", 4, {"scheme": "4x8", "epochs": 2}),
    ("int4 symmetric g64", "symmetric", 4, {}),
    ("hqq 4 g64", "hqq", 4, {}),
    ("gptq 4 g64", "gptq", 4, {}),
    ("hqq 3 g64", "hqq", 3, {}),
    ("gptq 3 g64", "gptq", 3, {}),
    ("aqlm 3x8", "aqlm", 3, {"scheme": "3x8", "epochs": 2}),
    ("hqq 2 g64", "hqq", 2, {}),
    ("gptq 2 g64", "gptq", 2, {}),
    ("aqlm 2x8", "aqlm", 2, {"scheme": "2x8", "epochs": 2}),
]


def row(
    model: Path, label: str, method: str, bits: int, options: dict[str, Any], args: Any
) -> dict[str, Any]:
    """Compile once and keep the figures."""
    with tempfile.TemporaryDirectory() as folder:
        report = compile_model(
            CompileOptions(
                model=str(model),
                method=method,
                bits=bits,
                method_options=get_method(method).validate(options),
                output=Path(folder) / "artifact",
                device="cpu",
                dtype="float32",
                eval_text=args.text,
                eval_tokens=args.eval_tokens,
                calib_text=args.calib_text,
                calib_tokens=args.calib_tokens,
            )
        )
    assert report.quality is not None
    return {
        "label": label,
        "options": options,
        "bits_per_weight_linears": report.bits_per_weight_linears,
        "seconds": round(report.seconds, 1),
        **report.quality.to_json(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [
        f"Original perplexity {rows[0]['perplexity_original']:.3f}; {rows[0]['tokens']} scored tokens.",
        "",
        "| method | bits per weight | perplexity | KL, nats per token | same top-1 | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for item in rows:
        change = 100 * (item["perplexity"] / item["perplexity_original"] - 1)
        cells = (
            item["label"],
            f"{item['bits_per_weight_linears']:.3f}",
            f"{item['perplexity']:.3f} ({change:+.2f} %)",
            f"{item['kl_mean']:.5f} ± {item['kl_se']:.5f}",
            f"{100 * item['top1_agreement']:.2f} %",
            f"{item['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept(name: str) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"methods-{name}.json").read_text("utf-8"))["rows"]
    return rows


def main() -> None:
    """Run the rows and write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calib-text", type=Path)
    parser.add_argument("--calib-tokens", type=int, default=32768)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--only", action="append")
    parser.add_argument("--row", action="append")
    parser.add_argument("--tables-only", action="store_true", help="rewrite the tables from the JSON files")
    args = parser.parse_args()
    for name in args.only or ["tiny-llama", "small-llama"]:
        if args.tables_only:
            write_between(f"methods-{name}", table(kept(name)))
            continue
        measured = {item["label"]: item for item in kept(name)} if args.row else {}
        for label, method, bits, options in ROWS:
            if not args.row or label in args.row:
                item = row(args.models / name, label, method, bits, options, args)
                measured[label] = item
                print(name, label, round(item["kl_mean"], 5), item["seconds"], flush=True)
        rows = [measured[label] for label, *_ in ROWS if label in measured]
        settings = {
            "command": "python -m benchmarks.methods --models DIR --text FILE --calib-text FILE",
            "calib_tokens": args.calib_tokens,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": rows,
        }
        (RESULTS / f"methods-{name}.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        write_between(f"methods-{name}", table(rows))


if __name__ == "__main__":
    main()
