"""int8_channel: symmetric 8-bit integers, one scale per output channel: w[n, k] = codes[n, k] · scales[n].

Stored tensors of a weight [N, K]: `codes` int8 [N, K] and `scales` [N].

Two ops compute with it. Without `outlier_threshold` activations stay as they are (weight-only, as
in EETQ); with it both sides are int8 and activation columns that reach the threshold stay in half
precision (LLM.int8(), Dettmers et al. 2022). There bitsandbytes' statistic SCB = absmax of a row
is 127 · scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import TensorSpec, register_format

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Int8ChannelSpec:
    """Settings of the int8_channel format.

    Args:
        outlier_threshold: None: weight-only. Else activations are quantized at run time, but for
            columns with a magnitude of at least this; 0 quantizes all of them.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        InvalidInputError: A setting outside of these.
    """

    outlier_threshold: float | None = None
    scale_dtype: torch.dtype = torch.float32

    name = "int8_channel"
    bits = 8

    def __post_init__(self) -> None:
        threshold = self.outlier_threshold
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise InvalidInputError(
                f"The outlier threshold is {threshold}; it must be finite and not negative.",
                hint="6.0 is what LLM.int8() proposes; 0 quantizes every activation.",
            )
        if self.scale_dtype not in SCALE_DTYPES.values():
            raise InvalidInputError(
                f"Scales cannot be stored as {self.scale_dtype}.", hint=f"Choose from {tuple(SCALE_DTYPES)}."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; `from_json` reads it back."""
        return {
            "format": self.name,
            "outlier_threshold": self.outlier_threshold,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Int8ChannelSpec:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: A missing, unknown or wrong entry.
        """
        if set(data) != {"format", "outlier_threshold", "scale_dtype"} or data["format"] != cls.name:
            raise InvalidInputError(f"Not the settings of an int8_channel format: {dict(data)!r}.")
        threshold, dtype = data["outlier_threshold"], data["scale_dtype"]
        if not (threshold is None or type(threshold) in (int, float)) or dtype not in SCALE_DTYPES:
            raise InvalidInputError(f"Wrong settings of an int8_channel format: {dict(data)!r}.")
        return cls(None if threshold is None else float(threshold), SCALE_DTYPES[dtype])


class Int8ChannelFormat:
    """The int8_channel format's functions; settings come as an `Int8ChannelSpec`."""

    name = Int8ChannelSpec.name

    def spec_from_json(self, data: Mapping[str, Any]) -> Int8ChannelSpec:
        """See `Int8ChannelSpec.from_json`."""
        return Int8ChannelSpec.from_json(data)

    def tensor_specs(
        self, spec: Int8ChannelSpec, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight [out_features, in_features]."""
        if out_features < 1 or in_features < 1:
            raise InvalidInputError(f"A weight [{out_features}, {in_features}] has no elements to store.")
        return {
            "codes": TensorSpec((out_features, in_features), torch.int8),
            "scales": TensorSpec((out_features,), spec.scale_dtype),
        }

    def pack(
        self, spec: Int8ChannelSpec, codes: torch.Tensor, scales: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Store codes and scales.

        Args:
            spec: The format's settings.
            codes: int8 [N, K].
            scales: Floating point [N].

        Returns:
            The tensors named by `tensor_specs`, contiguous.

        Raises:
            InvalidInputError: Wrong shapes or dtypes, or a scale that is not finite in its stored dtype.
        """
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise InvalidInputError(f"Codes must be int8 [N, K], not {codes.dtype} {list(codes.shape)}.")
        stored = scales.to(spec.scale_dtype)
        tensors = {"codes": codes.contiguous(), "scales": stored.contiguous()}
        self._check(spec, tensors, codes.shape[1])
        if not stored.is_meta and not bool(torch.isfinite(stored).all()):
            raise InvalidInputError(
                f"scales hold a value that is not finite as {stored.dtype}.",
                hint="Store them as float32 (scale_dtype).",
            )
        return tensors

    def dequantize(
        self, spec: Int8ChannelSpec, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [N, K] = code · scale, computed in float32 and cast to `dtype`."""
        self._check(spec, tensors, in_features)
        return (tensors["codes"].float() * tensors["scales"].float()[:, None]).to(dtype)

    def concat(
        self, spec: Int8ChannelSpec, parts: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Weights of equal in_features and settings side by side along out_features.

        Raises:
            InvalidInputError: No parts, or parts whose in_features differ.
        """
        if not parts:
            raise InvalidInputError("There is nothing to concatenate.")
        if len({tensors["codes"].shape[1] for tensors in parts}) != 1:
            raise InvalidInputError("Weights of different in_features cannot stand side by side.")
        return {part: torch.cat([tensors[part] for tensors in parts]) for part in ("codes", "scales")}

    def nbytes(self, spec: Int8ChannelSpec, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight: codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensor_specs(spec, out_features, in_features).values())

    def bits_per_weight(self, spec: Int8ChannelSpec, out_features: int, in_features: int) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes(spec, out_features, in_features) / (out_features * in_features)

    def op_call(
        self, spec: Int8ChannelSpec, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The op and its arguments for `linear(x, weight, bias)`; values may be tensors or graph nodes.

        `qcompiler::linear_int8`, or `qcompiler::linear_llm_int8` where the spec has a threshold.
        """
        import qcompiler.kernels.ops.linear_int8
        import qcompiler.kernels.ops.linear_llm_int8  # noqa: F401  (registers the ops)

        codes, scales = tensors["codes"], tensors["scales"]
        if spec.outlier_threshold is None:
            return torch.ops.qcompiler.linear_int8.default, (x, codes, scales, bias)
        return torch.ops.qcompiler.linear_llm_int8.default, (x, codes, scales, bias, spec.outlier_threshold)

    def grouped_tensor_specs(
        self, spec: Int8ChannelSpec, experts: int, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `GroupedFormat`; experts are weight-only.

        Raises:
            InvalidInputError: An outlier threshold: no op quantizes the activations of experts.
        """
        if spec.outlier_threshold is not None:
            raise InvalidInputError(
                "LLM.int8() has no op for expert weights.", hint="Choose eetq for 8 bits, or bnb's 4 bits."
            )
        return self.tensor_specs(spec, experts * out_features, in_features)

    def grouped_op_call(
        self,
        spec: Int8ChannelSpec,
        x: Any,
        tensors: Mapping[str, Any],
        offsets: Any,
        bias: Any,
        in_features: int,
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::grouped_linear_int8` and its arguments; see `GroupedFormat`."""
        import qcompiler.kernels.ops.grouped_linear_int8  # noqa: F401  (registers the op)

        return torch.ops.qcompiler.grouped_linear_int8.default, (
            x, tensors["codes"], tensors["scales"], offsets, bias,
        )  # fmt: skip

    def _check(self, spec: Int8ChannelSpec, tensors: Mapping[str, torch.Tensor], in_features: int) -> None:
        codes = tensors.get("codes")
        rows = codes.shape[0] if codes is not None and codes.dim() == 2 else 1
        for part, wanted in self.tensor_specs(spec, rows, in_features).items():
            tensor = tensors.get(part)
            if tensor is None or tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise InvalidInputError(
                    f"int8_channel tensor {part!r} is {found}; in_features {in_features} needs "
                    f"{wanted.dtype} {list(wanted.shape)}."
                )


INT8_CHANNEL = Int8ChannelFormat()
register_format(INT8_CHANNEL)
