"""Tells one checkpoint from another without reading it whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE = 1 << 20
_READ = ("*.safetensors", "config.json", "tokenizer.json", "generation_config.json")


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes, and the first and last MiB of the files that a compilation reads.

    A safetensors file begins with its header, so other tensors, shapes or dtypes always show; other
    weights of the same shapes show as soon as one of them lies in a sample.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(_SAMPLE, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
