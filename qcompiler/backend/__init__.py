"""`torch.compile(model, backend="qcompiler")`: our passes on Dynamo's graphs, the rest by inductor.

For inference. A graph is traced to aten ops, its linears are quantized, and what
remains is compiled with the stored tensors as inputs. The float parameters that
Dynamo passes at each call only say which stored tensors to take: a layer compiled
once and called with another layer's parameters computes with that layer's weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import GraphModule

    from qcompiler.backend.compile import Backend as Backend
    from qcompiler.backend.compile import GraphReport as GraphReport
    from qcompiler.backend.options import BackendOptions as BackendOptions

__all__ = ["Backend", "BackendOptions", "GraphReport", "forget", "qcompiler"]

_LAZY = {
    "Backend": "qcompiler.backend.compile",
    "GraphReport": "qcompiler.backend.compile",
    "BackendOptions": "qcompiler.backend.options",
}


def qcompiler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend as torch finds it by name.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs, parameters among them.
        mode: One of inductor's modes ("reduce-overhead", "max-autotune" …).
        options: See `BackendOptions`.

    Raises:
        InvalidInputError: An option that does not exist or has a wrong value. Dynamo wraps what a backend
            raises in `BackendCompilerFailed`; `Backend(...)`, passed as the backend, is checked when made.
    """
    from qcompiler.backend.compile import Backend

    return Backend(mode=mode, **dict(options or {}))(gm, example_inputs)


def forget() -> None:
    """Quantize every weight anew at its next use, after writes that torch does not count (`.data`)."""
    from qcompiler.backend.weights import WEIGHTS

    WEIGHTS.clear()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qcompiler.backend' has no attribute {name!r}")
