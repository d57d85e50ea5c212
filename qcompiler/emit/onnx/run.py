"""Runs an emitted model in onnxruntime, for checks and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.emit.onnx.attention import MASK
from qcompiler.emit.onnx.files import MODEL
from qcompiler.kernels.errors import InvalidInputError

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PAST = "past_key_values."


class OnnxModel:
    """An emitted model on onnxruntime's CPU provider.

    Args:
        folder: What `emit_onnx` wrote.
        threads: Threads of one operator; onnxruntime's own choice when 0.

    Raises:
        InvalidInputError: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, threads: int = 0):
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise InvalidInputError(
                "running an ONNX model needs the package onnxruntime",
                hint='Install it: pip install "qcompiler[onnx]"',
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / MODEL), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {i.name: i for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]

    def empty_cache(self, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
        """A cache of no tokens: an array [batch, heads, 0, size] per cache input."""
        return {
            name: np.zeros((batch, i.shape[1], 0, i.shape[3]), _DTYPES[i.type])
            for name, i in self._inputs.items()
            if name.startswith(_PAST)
        }

    def step(
        self,
        tokens: npt.NDArray[np.int64],
        cache: dict[str, npt.NDArray[Any]],
        mask: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        """One run of a decoder.

        Args:
            tokens: Token ids [batch, sequence].
            cache: What the step before gave, or `empty_cache`.
            mask: Attention mask [batch, past + sequence]; all ones when None.

        Returns:
            Logits [batch, sequence, vocabulary], and the cache with these tokens.
        """
        past = next(iter(cache.values())).shape[2]
        if mask is None:
            mask = np.ones((tokens.shape[0], past + tokens.shape[1]), np.int64)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        given = {"input_ids": tokens, "position_ids": positions, MASK: mask, **cache}
        results = self.session.run(None, {name: given[name] for name in self._inputs})
        found = dict(zip(self._outputs, results, strict=True))
        return found["logits"], {name: found[name.replace(_PAST, "present.")] for name in cache}

    def encode(
        self, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[Any]:
        """One run of an encoder: token ids [batch, sequence] to [batch, sequence, features]."""
        mask = np.ones_like(tokens) if mask is None else mask
        given = {"input_ids": tokens, "token_type_ids": np.zeros_like(tokens), MASK: mask}
        return self.session.run(None, {name: given[name] for name in self._inputs})[0]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow a prompt, each the likeliest."""
        logits, cache = self.step(np.array([prompt], np.int64), self.empty_cache())
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            logits, cache = self.step(np.array([found[-1:]], np.int64), cache)
            found.append(int(logits[0, -1].argmax()))
        return found
