"""Checkpoints of real shapes with synthetic weights, and `qcompile` over them in a process of its own."""

from __future__ import annotations

import json
import platform
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


def device_name(device: str) -> str:
    """What the figures were taken on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu"
