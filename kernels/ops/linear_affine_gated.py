"""Gate and up projection as one linear with the activation inside: y = act(x · Wgᵀ + bg) · (x · Wuᵀ + bu).

The weight is that of `linear_affine` with the rows of gate first and those of
up second, as a linear over both has them, so nothing is stored otherwise. Both
products are rounded to x's dtype first: the result is that of `linear_affine`
followed by `silu_mul` or `gelu_mul`, which never goes to memory in between.
"""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.library import Op, register_op
from qcompiler.kernels.ops import gated_activation, linear_affine, linear_affine_sides  # noqa: F401

# What an `activation` argument may be, and the op on halves that it stands for.
ACTIVATIONS = {"silu": ("silu_mul",), "gelu": ("gelu_mul", "none"), "gelu_tanh": ("gelu_mul", "tanh")}
SUFFIX = "_gated"


def activate_halves(y: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half of the last dimension) · second half.

    Raises:
        InvalidInputError: No such activation, or no two halves.
    """
    name, *options = check_gated(activation, y.shape[-1])
    gate, up = y.chunk(2, dim=-1)
    return getattr(torch.ops.qcompiler, name).default(gate, up, *options)


def check_gated(activation: str, columns: int) -> tuple[str, ...]:
    """The op on halves, with its options, that an activation stands for over so many out_features.

    Raises:
        InvalidInputError: No such activation, or no two halves.
    """
    if activation not in ACTIVATIONS:
        raise InvalidInputError(
            f"gated linear: unknown activation {activation!r}", hint=f"Use one of {', '.join(ACTIVATIONS)}."
        )
    if columns % 2:
        raise InvalidInputError(f"gated linear: {columns} out_features have no two halves")
    return ACTIVATIONS[activation]


def register_gated(linear: Op, *, cuda: str | None = None) -> Op:
    """Register `<linear>_gated`: the linear with one more argument, the activation of its first half.

    Args:
        linear: A linear whose last argument is followed by the activation.
        cuda: See `register_op`.
    """
    name = linear.schema.split("(", 1)[0]
    schema = linear.schema.replace(f"{name}(", f"{name}{SUFFIX}(", 1).replace(
        ") -> ", ", str activation) -> ", 1
    )

    def reference(*args: Any) -> torch.Tensor:
        return activate_halves(linear.reference(*args[:-1]), args[-1])

    # Where an op belongs is told by the module of its reference.
    reference.__module__ = linear.reference.__module__

    def fake(*args: Any) -> torch.Tensor:
        y = linear.fake(*args[:-1])
        check_gated(args[-1], y.shape[-1])
        return y.new_empty((*y.shape[:-1], y.shape[-1] // 2))

    return register_op(schema, reference=reference, fake=fake, cuda=cuda)


def gated_op(linear: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The gated form of a registered linear."""
    name = linear._schema.name.split("::")[1]
    return getattr(torch.ops.qcompiler, f"{name}{SUFFIX}").default


LINEAR_AFFINE_GATED = register_gated(
    linear_affine.LINEAR_AFFINE, cuda="qcompiler.kernels.triton.linear.affine:linear_affine_gated_triton"
)
LINEAR_AFFINE_SIDES_GATED = register_gated(
    linear_affine_sides.LINEAR_AFFINE_SIDES,
    cuda="qcompiler.kernels.triton.linear.affine_sides:linear_affine_sides_gated_triton",
)
