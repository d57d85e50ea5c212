"""Texts as tokens of a model's own tokenizer: for evaluation and for calibration."""

from __future__ import annotations

from pathlib import Path

import torch

from qcompiler.data import default_text
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.plan import CompilePlan


def text_tokens(plan: CompilePlan, path: Path | None, shipped: str, count: int) -> torch.Tensor | None:
    """The first `count` tokens of a text, without special tokens, int64 [tokens].

    Args:
        plan: Tells the tokenizer.
        path: The text; None means a shipped one.
        shipped: Which: "eval" or "calib".
        count: Tokens wanted; fewer if the text is shorter.

    Returns:
        The tokens, or None if the checkpoint has no tokenizer.json.

    Raises:
        InvalidInputError: The text is not UTF-8, or shorter than two tokens.
    """
    from tokenizers import Tokenizer

    tokenizer = plan.file("tokenizer.json")
    if tokenizer is None:
        return None
    text = default_text(shipped) if path is None else read_text(path)
    # A token rarely stands for more than 16 characters; encoding no more than needed keeps large files cheap.
    ids = Tokenizer.from_file(str(tokenizer)).encode(text[: 16 * count], add_special_tokens=False).ids[:count]
    if len(ids) < 2:
        raise InvalidInputError(f"{path or shipped} has {len(ids)} tokens; at least 2 are needed")
    return torch.tensor(ids, dtype=torch.int64)


def read_text(path: Path) -> str:
    """A text file as UTF-8.

    Raises:
        InvalidInputError: It is not.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
