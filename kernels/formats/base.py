"""What a storage format is: named tensors with shapes and dtypes, and the functions between them and weights.

A format stores numbers that a method decided; one op computes with it. The
registry maps the name in a manifest to the object that knows the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from qcompiler.kernels.errors import InvalidInputError

SpecT = TypeVar("SpecT")
SpecIn = TypeVar("SpecIn", contravariant=True)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@runtime_checkable
class Format(Protocol[SpecT]):
    """A storage format; `spec` is its frozen settings (bits, group size, ...).

    All functions also work on meta tensors, where they give shapes only.
    """

    name: str

    def spec_from_json(self, data: Mapping[str, Any]) -> SpecT:
        """Read back what `spec.to_json()` wrote; unknown or wrong entries are refused."""
        ...

    def tensor_specs(self, spec: SpecT, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of one weight [out_features, in_features]."""
        ...

    def dequantize(
        self, spec: SpecT, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [out_features, in_features] that the tensors stand for."""
        ...

    def concat(self, spec: SpecT, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Weights of equal in_features side by side along out_features."""
        ...

    def nbytes(self, spec: SpecT, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight: codes, padding, scales, zeros, everything."""
        ...

    def bits_per_weight(self, spec: SpecT, out_features: int, in_features: int) -> float:
        """8 · nbytes / (out_features · in_features)."""
        ...

    def op_call(
        self, spec: SpecT, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The op and its arguments for `linear(x, weight, bias)`; values may be tensors or nodes."""
        ...


@runtime_checkable
class GroupedFormat(Protocol[SpecIn]):
    """A format with an op for expert weights.

    Weights [experts, out_features, in_features] are stored as the one weight
    [experts·out_features, in_features], expert after expert, as `concat` lays them side by side.
    """

    def grouped_tensor_specs(
        self, spec: SpecIn, experts: int, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of all experts; `out_features` are those of one.

        Raises:
            InvalidInputError: The op for experts does not take these settings.
        """
        ...

    def grouped_op_call(
        self, spec: SpecIn, x: Any, tensors: Mapping[str, Any], offsets: Any, bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The op and its arguments for `grouped_linear(x, weight, offsets, bias)`; tensors or nodes."""
        ...


@runtime_checkable
class EmbeddingFormat(Protocol[SpecIn]):
    """A format with an op that gathers rows: a table [num_embeddings, embedding_dim] stored as a weight."""

    def embedding_op_call(
        self, spec: SpecIn, ids: Any, tensors: Mapping[str, Any], embedding_dim: int, dtype: torch.dtype
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The op and its arguments for `embedding(weight, ids)` with a result of `dtype`."""
        ...


def expert_tensor_specs(
    format_: Format[Any], spec: Any, experts: int, out_features: int, in_features: int
) -> dict[str, TensorSpec]:
    """Stored tensors of a weight whose `out_features` rows are divided among experts, or of a plain one.

    Raises:
        InvalidInputError: The rows cannot be divided, or the format has no op for experts.
    """
    if experts == 1:
        return format_.tensor_specs(spec, out_features, in_features)
    if not isinstance(format_, GroupedFormat):
        raise InvalidInputError(f"Format {format_.name!r} has no op for expert weights.")
    if experts < 1 or out_features % experts:
        raise InvalidInputError(f"{out_features} rows cannot be divided among {experts} experts.")
    return format_.grouped_tensor_specs(spec, experts, out_features // experts, in_features)


_FORMATS: dict[str, Format[Any]] = {}


def register_format(format_: Format[Any]) -> None:
    """Make a format known under its name.

    Raises:
        InvalidInputError: Another format already has this name.
    """
    if _FORMATS.setdefault(format_.name, format_) is not format_:
        raise InvalidInputError(f"A format named {format_.name!r} is already registered.")


def get_format(name: str) -> Format[Any]:
    """The format registered under `name`, or declared under it by an installed package.

    Raises:
        InvalidInputError: No such format.
    """
    from qcompiler.kernels.formats.plugins import plugin_format

    format_ = _FORMATS.get(name) or plugin_format(name)
    if format_ is None:
        known = ", ".join(sorted(_FORMATS)) or "none"
        raise InvalidInputError(
            f"Unknown storage format {name!r}.",
            hint=f"Known formats: {known}; others come with the package that declares them.",
        )
    return format_
