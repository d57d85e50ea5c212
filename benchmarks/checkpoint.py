"""Checkpoints of real shapes with synthetic weights, and `qcompile` over them in a process of its own.

python -m benchmarks.checkpoint llama3-8b DIR [--layers 8]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

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
    block = torch.randn(_RANDOM, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    random, ones = (bytes(t.view(torch.uint8).numpy()) for t in (block, torch.ones_like(block)))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in wanted.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        shards.setdefault(layer, {})[name] = tensor
    files = {f"model-{number:05d}.safetensors": held for number, held in enumerate(shards.values())}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: write_shard(folder / item[0], item[1], random, ones), files.items()))
    index = {name: file for file, held in files.items() for name in held}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return max(2 * tensor.numel() for tensor in wanted.values())


def write_shard(path: Path, tensors: dict[str, torch.Tensor], random: bytes, ones: bytes) -> None:
    """A safetensors file of bfloat16 tensors: matrices repeat `random`, vectors repeat `ones`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            source, left = memoryview(random if tensor.dim() > 1 else ones), 2 * tensor.numel()
            while left:
                left -= file.write(source[:left])


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


def device_name(device: str) -> str:
    """What the figures were taken on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu"


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    began = time.perf_counter()
    make_checkpoint(options.shape, options.folder, options.layers)
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    print(f"{size / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
