"""qcompiler: compile Hugging Face models into quantized, deployable artifacts.

Importing the package is light; torch is loaded by what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.quantize_module import quantize as quantize
    from qcompiler.runtime.model import Model as Model
    from qcompiler.runtime.model import load as load

__version__ = "0.1.0"

# name -> module that defines it; resolved at first use (PEP 562).
_LAZY = {
    "load": "qcompiler.runtime.model",
    "Model": "qcompiler.runtime.model",
    "SamplingParams": "qcompiler.runtime.sampling",
    "QCompilerError": "qcompiler.kernels.errors",
    "quantize": "qcompiler.quantize_module",
}

__all__ = ["Model", "QCompilerError", "SamplingParams", "__version__", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
