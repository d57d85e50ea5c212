"""Emitted ONNX models beside our engine on a CPU: agreement, sizes, tokens per second, cost of integer zeros.

    python -m benchmarks.onnx_models --models DIR [--only tiny-llama]

DIR holds the folders tiny-llama (the one in examples/models) and small-llama. Writes
benchmarks/results/onnx-<model>.json and the tables between the markers of docs/onnx.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.quality import RESULTS
from qcompiler.data import default_text
from qcompiler.emit.onnx.emit import OnnxOptions, emit_onnx
from qcompiler.emit.onnx.files import DATA, MODEL
from qcompiler.emit.onnx.run import OnnxModel
from qcompiler.options import CompileOptions
from qcompiler.pipeline import compile_model
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.model import Model, load

DOC = Path(__file__).resolve().parent.parent / "docs" / "onnx.md"
PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 10, 32, 128

# name in the table, method, bits, options of the method
ROWS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("not quantized", "none", 16, {}),
    ("eetq 8", "eetq", 8, {}),
    ("hqq 8 g64", "hqq", 8, {"zeros": "integer"}),
    ("hqq 4 g64", "hqq", 4, {"zeros": "integer"}),
    ("nf4", "bnb", 4, {}),
]


def compiled(model: Path, method: str, bits: int, options: dict[str, Any], out: Path, tokens: int) -> Any:
    """Compile in fp32 for the CPU; returns the report."""
    return compile_model(
        CompileOptions(
            model=str(model),
            method=method,
            bits=bits,
            method_options=options,
            output=out,
            device="cpu",
            dtype="float32",
            eval_tokens=tokens,
        )
    )


def emitted(artifact: Path, out: Path, **options: Any) -> OnnxModel:
    """Emit and open."""
    emit_onnx(open_artifact(artifact), out, OnnxOptions(**options), overwrite=True)
    return OnnxModel(out, threads=1)


def agreement(engine: Model, model: OnnxModel) -> dict[str, Any]:
    """Greedy texts that are equal, and the largest difference between logits."""
    text = engine.tokenizer.encode(default_text("eval")[:20000], add_special_tokens=False)
    prompts = [text[i * 97 : i * 97 + 4 + 2 * i] for i in range(PROMPTS)]
    wanted = engine.generate_tokens(prompts, temperature=0.0, max_tokens=NEW_TOKENS)
    same = sum(
        model.generate(prompt, NEW_TOKENS)[: len(one.token_ids)] == one.token_ids
        for prompt, one in zip(prompts, wanted, strict=True)
    )
    window = text[:PROMPT_TOKENS]
    logits, _ = model.step(np.array([window]), model.empty_cache())
    reference = engine.logits(window).float().numpy()
    return {
        "same_texts": same,
        "texts": PROMPTS,
        "max_logit_difference": float(np.abs(logits[0] - reference).max()),
        "max_logit": float(np.abs(reference).max()),
    }


def speeds(runs: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> dict[str, dict[str, float]]:
    """Best prompt and generated tokens per second of each, taken in turns: other load hits all alike."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds = run()
            known = best.get(name, seconds)
            best[name] = (min(known[0], seconds[0]), min(known[1], seconds[1]))
    return {
        name: {"prompt": PROMPT_TOKENS / prompt, "generated": NEW_TOKENS / decode}
        for name, (prompt, decode) in best.items()
    }


def time_engine(engine: Model) -> tuple[float, float]:
    """Seconds for a prompt and for the tokens after its first."""
    from qcompiler.runtime.bench import _one_run

    return _one_run(engine, 1, PROMPT_TOKENS, NEW_TOKENS, seed=1)


def time_onnx(model: OnnxModel) -> tuple[float, float]:
    """The same in onnxruntime."""
    tokens = np.random.default_rng(1).integers(3, 1000, (1, PROMPT_TOKENS))
    start = time.perf_counter()
    logits, cache = model.step(tokens, model.empty_cache())
    middle = time.perf_counter()
    for _ in range(NEW_TOKENS):
        logits, cache = model.step(logits[:, -1:].argmax(-1), cache)
    return middle - start, time.perf_counter() - middle


def row(
    model: Path, label: str, method: str, bits: int, options: dict[str, Any], args: Any
) -> dict[str, Any]:
    """Compile, emit, compare and time one variant."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = compiled(model, method, bits, options, folder / "a", args.eval_tokens)
        exact, fast = (
            emitted(folder / "a", folder / "o"),
            emitted(folder / "a", folder / "f", accuracy_level=4),
        )
        engine = load(folder / "a", device="cpu")
        found: dict[str, Any] = {
            "label": label,
            "kl": None if report.quality is None else report.quality.kl_mean,
            "artifact_bytes": sum(f.stat().st_size for f in (folder / "a").glob("*.safetensors")),
            "onnx_bytes": sum((folder / "o" / file).stat().st_size for file in (MODEL, DATA)),
            **agreement(engine, exact),
        }
        runs = {
            "engine": lambda: time_engine(engine),
            "onnx": lambda: time_onnx(exact),
            "onnx int8 activations": lambda: time_onnx(fast),
        }
        if "zeros" in options:
            other = compiled(model, method, bits, {"zeros": "float"}, folder / "af", args.eval_tokens)
            found["kl_float_zeros"] = None if other.quality is None else other.quality.kl_mean
            if bits != 8:  # onnxruntime's CPU refuses 8 bits with float zero points
                slow = emitted(folder / "af", folder / "s", zeros="float")
                runs["onnx float zeros"] = lambda: time_onnx(slow)
        found["tokens_per_second"] = speeds(runs, args.repeats)
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as two markdown tables."""
    lines = [
        "| weights | artifact, MB | ONNX, MB | equal texts | largest logit difference | "
        "KL, integer zeros | KL, float zeros |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        kl = "" if r["kl"] is None else f"{r['kl']:.5f}"
        other = f"{r['kl_float_zeros']:.5f}" if r.get("kl_float_zeros") is not None else ""
        cells = (
            r["label"], f"{r['artifact_bytes'] / 1e6:.2f}", f"{r['onnx_bytes'] / 1e6:.2f}",
            f"{r['same_texts']}/{r['texts']}", f"{r['max_logit_difference']:.1e} of {r['max_logit']:.1f}",
            kl, other,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    names = ["engine", "onnx", "onnx int8 activations", "onnx float zeros"]
    lines += ["", f"| tokens/s, prompt / generated | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for r in rows:
        speed = r["tokens_per_second"]
        cells = tuple(
            f"{speed[n]['prompt']:.0f} / {speed[n]['generated']:.1f}" if n in speed else "" for n in names
        )
        lines.append(f"| {r['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_between(name: str, text: str) -> None:
    """Replace what stands between the markers of the page."""
    page = DOC.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    head, rest = page.split(begin)
    DOC.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    """Run the rows and write results and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only or ["tiny-llama", "small-llama"]:
        rows = []
        for label, method, bits, options in ROWS:
            rows.append(row(args.models / name, label, method, bits, options, args))
            print(name, json.dumps(rows[-1]), flush=True)
        settings = {
            "command": "python -m benchmarks.onnx_models --models DIR",
            "eval_tokens": args.eval_tokens,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "machine": platform.machine(),
            "threads": 1,
            "rows": rows,
        }
        (RESULTS / f"onnx-{name}.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        write_between(f"onnx-{name}", tables(rows))


if __name__ == "__main__":
    main()
