"""Checkpoints for the compiler's tests: the shipped model, and tiny random ones made on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY_LLAMA = ROOT / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The really trained model that ships with the project."""
    return TINY_LLAMA


def random_checkpoint(folder: Path, **changes) -> Path:
    """A llama with random weights, saved as transformers saves it, with the shipped tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory) -> Path:
    """A random two-layer llama."""
    return random_checkpoint(tmp_path_factory.mktemp("random") / "llama")


@pytest.fixture(scope="session")
def make_checkpoint():
    """`make_checkpoint(folder, **config_changes)`: see `random_checkpoint`."""
    return random_checkpoint
