"""A whole model: compile time and memory, then speed beside the unquantized model in the same engine.

    python -m benchmarks.model --shape llama3-8b --work DIR --output benchmarks/results/model.json

Makes a checkpoint of the shape with synthetic weights in DIR (16 GB for 8B), compiles it with
`--method none` and with each of the methods asked for, each in a process of its own so that its peak
memory is its own, and benches the artifacts one after another on the same device. On a GPU the read
ceiling is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "llama3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "llama-500m": {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 14, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "toy": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024,
    },
}  # fmt: skip
# One really random block of weights, repeated: quantizers see ordinary numbers, and making it costs no time.
_RANDOM = 1 << 22


def make_checkpoint(shape: str, folder: Path, layers: int | None = None) -> int:
    """Write a llama checkpoint with a shard per layer; returns the bytes of its largest tensor.

    Args:
        shape: Key of `SHAPES`.
        folder: Where to; must not exist.
        layers: So many layers instead of all.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    sizes = SHAPES[shape] if layers is None else {**SHAPES[shape], "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    source = torch.randn(_RANDOM, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in wanted.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(layer, {})[name] = tensor
    index, largest = {}, 0
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        filled = {}
        for name, tensor in tensors.items():
            repeats = -(-tensor.numel() // _RANDOM)
            flat = (
                source.repeat(repeats)[: tensor.numel()]
                if tensor.dim() > 1
                else torch.ones_like(tensor, device="cpu")
            )
            filled[name] = flat.reshape(tensor.shape).to(torch.bfloat16).contiguous()
            largest = max(largest, filled[name].nbytes)
            index[name] = file
        save_file(filled, folder / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return largest


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of which every token is a word, for what speaks text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"unk_token": "w0"}\n', encoding="utf-8")


def qcompile(checkpoint: Path, artifact: Path, arguments: list[str]) -> dict[str, Any]:
    """Compile in a process of its own; the report that `--json` prints."""
    command = [sys.executable, "-m", "qcompiler.cli.main", str(checkpoint), "-o", str(artifact), *arguments]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--json", "--eval-tokens", "0", "-q", "--overwrite"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    report = json.loads(done.stdout)
    report["process_seconds"] = time.perf_counter() - started
    return {key: value for key, value in report.items() if key not in ("layers", "linears_skipped")}


def bench_artifact(artifact: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Speed of one artifact, and a 2048-token (or `--prompt-tokens`) prefill."""
    from qcompiler.runtime.bench import bench
    from qcompiler.runtime.model import load

    started = time.perf_counter()
    model = load(artifact, device=options.device, verify="sizes")
    loaded = time.perf_counter() - started
    rows = bench(
        model, batches=tuple(options.batches), prompt_tokens=options.prompt_tokens,
        decode_tokens=options.decode_tokens,
    )  # fmt: skip
    return {"load_seconds": loaded, "rows": [row.to_json() for row in rows]}


def device_name(device: str) -> str:
    """What the figures were taken on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu"


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and artifacts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--variant", action="append", help='qcompile arguments, e.g. "--method hqq --bits 4"')
    options = parser.parse_args()
    variants = ["--method none", *(options.variant or ["--method hqq --bits 4 --group-size 64"])]
    checkpoint = options.work / f"{options.shape}-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    largest = make_checkpoint(options.shape, checkpoint)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.model", *sys.argv[1:]]),
        "shape": options.shape,
        "device": device_name(options.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": 4 * largest + 1_000_000_000,
        "variants": [],
    }  # fmt: skip
    if options.device.startswith("cuda"):
        from benchmarks.timing import read_ceiling

        result["read_ceiling_us"] = {str(mb): read_ceiling(mb << 20, 50) for mb in (16, 64, 256)}
    for arguments in variants:
        artifact = options.work / f"{options.shape}-{len(result['variants'])}"
        report = qcompile(checkpoint, artifact, [*arguments.split(), "--device", options.device])
        row = {"arguments": arguments, "compile": report, "bench": bench_artifact(artifact, options)}
        result["variants"].append(row)
        decode = [round(r["decode_tokens_per_second"], 2) for r in row["bench"]["rows"]]
        prefill = [round(r["prefill_tokens_per_second"], 1) for r in row["bench"]["rows"]]
        print(
            f"{arguments}: compile {report['process_seconds']:.1f} s, "
            f"peak {report['peak_rss_bytes'] / 1e9:.2f} GB; "
            f"decode {decode}, prefill {prefill} tokens/s",
            flush=True,
        )
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(artifact)
    shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
