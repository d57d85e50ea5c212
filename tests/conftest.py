"""Without a GPU, Triton kernels run in its interpreter; the switch must be set before triton is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor, scope):
        # Loop bounds are arrays of one element there, which numpy 2.4 no longer takes for integers
        # (triton-lang/triton#9171, repaired after triton 3.6).
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _with_index
