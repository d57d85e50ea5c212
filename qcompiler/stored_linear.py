"""A linear layer whose weight stays in its storage format: what `qcompiler.quantize` puts into a module."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.kernels.formats.base import get_format
from qcompiler.kernels.providers import Provider, select_provider


class StoredLinear(nn.Module):
    """y = x · Wᵀ + bias with W in a storage format; its tensors are buffers named as the format names them.

    On a CPU, eager calls run on the provider that `qcompiler.kernels.providers` picks for the activations'
    dtype; what it prepares is made at the first call, is no part of the state, and is made anew when the
    stored tensors change. Under `torch.export` and `torch.compile` the format's own op is called, so that a
    graph holds stored tensors only and runs on any device. There are no gradients.

    Args:
        spec: Settings of the format.
        tensors: The format's tensors by part; may be on meta.
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: [out_features], or None.
        dtype: Of `weight`.
        lean: See `select_provider`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: Any,
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        *,
        lean: bool = False,
    ):
        super().__init__()
        self.spec = spec
        self.in_features = in_features
        self.out_features = out_features
        self.lean = lean
        self._dtype = dtype
        self._parts = tuple(tensors)
        for part, tensor in tensors.items():
            self.register_buffer(part, tensor)
        self.register_parameter("bias", bias)
        self._prepared: _Prepared | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by part."""
        return {part: getattr(self, part) for part in self._parts}

    @property
    def weight(self) -> Tensor:
        """The weight [out_features, in_features] that the codes stand for, made anew at each access.

        For code that looks at a linear's weight; the forward pass has no use for it.
        """
        weight: Tensor = get_format(self.spec.name).dequantize(
            self.spec, self.tensors, self.in_features, self._dtype
        )
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in_features] → [..., out_features] in the dtype of x."""
        op, arguments = get_format(self.spec.name).op_call(
            self.spec, x, self.tensors, self.bias, self.in_features
        )
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return op(*arguments)
        return self._provided(op, arguments, x)

    def _apply(self, fn: Any, recurse: bool = True) -> StoredLinear:
        """`.to(dtype)` and its kind move the bias and the dtype of `weight`; stored tensors keep theirs."""
        before = self.tensors
        super()._apply(fn, recurse)
        for part, tensor in before.items():
            moved = getattr(self, part)
            if moved.dtype != tensor.dtype:
                setattr(self, part, tensor.to(moved.device))
        first = next(iter(self.tensors.values()))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=first.device)).dtype
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        settings = ", ".join(f"{key}={value}" for key, value in self.spec.to_json().items())
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {settings}"

    def _provided(self, op: torch._ops.OpOverload, arguments: tuple[Any, ...], x: Tensor) -> Tensor:
        held = self.tensors if self.bias is None else {**self.tensors, "bias": self.bias}
        if self._prepared is None or not self._prepared.is_of(held, x.dtype):
            names = [argument.name for argument in op._schema.arguments]
            given = dict(zip(names, arguments, strict=True))
            attributes = {
                name: value
                for name, value in given.items()
                if name != "x" and value is not None and not isinstance(value, Tensor)
            }
            provider = select_provider(
                op._schema.name.partition("::")[2], attributes, held, x.device, x.dtype, lean=self.lean
            )
            with torch.no_grad():
                self._prepared = _Prepared(provider, held, *provider.prepare(held, attributes))
        ready = self._prepared
        return ready.provider.op(*ready.provider.bind(x, ready.tensors, ready.attributes))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # a copy prepares its own


class _Prepared:
    """A provider, what it made of the stored tensors, and which tensors those were."""

    def __init__(
        self, provider: Provider, held: Mapping[str, Tensor], tensors: dict[str, Tensor], attributes: Any
    ):
        self.provider = provider
        self.tensors = tensors
        self.attributes = attributes
        # Weak, so that tensors which were replaced do not live on here.
        self._made_from = {part: (weakref.ref(tensor), _version(tensor)) for part, tensor in held.items()}

    def is_of(self, held: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Whether it was made from just these tensors, as they are now, for activations of this dtype."""
        if self.provider.dtype != dtype or held.keys() != self._made_from.keys():
            return False
        return all(
            self._made_from[part][0]() is tensor and self._made_from[part][1] == _version(tensor)
            for part, tensor in held.items()
        )


def _version(tensor: Tensor) -> int:
    """Tells a tensor that was written to since."""
    return 0 if tensor.is_inference() else tensor._version
