"""How an op is registered: one reference (the semantics), one fake (the shapes), providers per device.

The reference is installed for every device, so an op is never missing; a
provider for one dispatch key (CUDA: Triton) then takes over there. Providers
are given as "module:function" and imported at their first call, so that
`import qcompiler.kernels.ops` needs no Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "qcompiler"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """A registered op; `reference` is plain torch and defines what every provider must compute."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable as it stands in graphs: `torch.ops.qcompiler.<name>.default`."""
        return getattr(torch.ops.qcompiler, self.name).default


def register_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: str | None = None,
    cpu: str | None = None,
) -> Op:
    """Register `qcompiler::<schema>`.

    Args:
        schema: Torch schema without the namespace, e.g. "silu_mul(Tensor gate, Tensor up) -> Tensor".
        reference: Plain torch implementation; used on every device that has no provider.
        fake: Shape and dtype propagation for meta and fake tensors.
        cuda: "module:function" of the CUDA provider.
        cpu: "module:function" of the CPU provider.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    for key, target in (("CUDA", cuda), ("CPU", cpu)):
        if target is not None:
            _LIBRARY.impl(name, _lazy(target), key)
    op = Op(name, schema, reference, fake)
    _OPS[name] = op
    return op


def registered_ops() -> dict[str, Op]:
    """All registered ops by name."""
    return dict(_OPS)


def _lazy(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    loaded: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            loaded = getattr(importlib.import_module(module), function)
        return loaded(*args, **kwargs)

    return call
