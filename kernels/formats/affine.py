"""Affine n-bit groupwise format: w = (code − zero) · scale, one scale and zero per group along in_features.

Stored tensors of a weight [N, K] (N = out_features, K = in_features):

- `low`    int32 [N, words]    the lower 2, 4 or 8 bits of every code;
- `high`   int16 or uint8 [N, words], only for 3, 5 and 6 bits: the upper 1 or 2 bits of the same codes;
- `scales` and `zeros` [groups, N], groups = ceil(K / group_size), or 1 when group_size is 0 (per channel).

| bits        | 2     | 3            | 4     | 5            | 6            | 8     |
|-------------|-------|--------------|-------|--------------|--------------|-------|
| low + high  | 2     | 2 + 1        | 4     | 4 + 1        | 4 + 2        | 8     |
| `high`      |       | int16        |       | uint8        | int16        |       |
| planes      | 8     | 8            | 4     | 4            | 4            | 2     |

Order of the codes. K is cut into blocks of planes·width codes; plane j of a
block is the `width` consecutive codes from block·planes·width + j·width on.
A block takes width/2 words, and word i of the block holds, from each plane,
the neighbours 2i and 2i+1: code (j, 2i+h), h in {0, 1}, has its low bits at
bit 16·h + j·low_bits of `low[i]` and its high bits at bit
h·(planes·high_bits) + j·high_bits of `high[i]`.

So a kernel reads each word once, one mask yields two neighbouring codes in
the two halves of a register, a plane meets a contiguous run of x, and a plane
lies inside one group (width divides the group size).

`width` follows from bits, group size and K (`block_width`): the largest of
64, 32, 16, 8, 4, 2 that divides the group size, keeps a block within 256
codes and pads K by at most 1/32; where none does, the one that pads least.
Padding codes are zero and are counted in `nbytes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import TensorSpec, register_format

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (0, 16, 32, 64, 128, 256)
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_LOW_BITS = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
PLANES = {bits: 16 // low for bits, low in _LOW_BITS.items()}
_HIGH_DTYPE = {3: torch.int16, 5: torch.uint8, 6: torch.int16}
_MAX_BLOCK = 256


@dataclass(frozen=True)
class AffineSpec:
    """Settings of the affine format.

    Args:
        bits: Bits per code: 2, 3, 4, 5, 6 or 8.
        group_size: Codes that share a scale: 16, 32, 64, 128, 256, or 0 for one group per output channel.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        InvalidInputError: A setting outside of these.
    """

    bits: int
    group_size: int = 64
    scale_dtype: torch.dtype = torch.float16

    name = "affine"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InvalidInputError(
                f"The affine format has no {self.bits}-bit codes.", hint=f"Choose bits from {BITS}."
            )
        if self.group_size not in GROUP_SIZES:
            raise InvalidInputError(
                f"The affine format has no group size {self.group_size}.",
                hint=f"Choose from {GROUP_SIZES[1:]}, or 0 for one group per output channel.",
            )
        if self.scale_dtype not in SCALE_DTYPES.values():
            raise InvalidInputError(
                f"Scales cannot be stored as {self.scale_dtype}.", hint=f"Choose from {tuple(SCALE_DTYPES)}."
            )

    @property
    def zero_dtype(self) -> torch.dtype:
        """Zero points are float32 beside float32 scales, else float16 (bfloat16 would round 8-bit zeros)."""
        return torch.float32 if self.scale_dtype == torch.float32 else torch.float16

    @property
    def low_bits(self) -> int:
        """Bits of a code held by `low`."""
        return _LOW_BITS[self.bits]

    @property
    def high_bits(self) -> int:
        """Bits of a code held by `high`; 0 when there is no such tensor."""
        return self.bits - self.low_bits

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; `from_json` reads it back."""
        return {
            "format": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AffineSpec:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: A missing, unknown or wrong entry.
        """
        expected = {"format", "bits", "group_size", "scale_dtype"}
        if set(data) != expected or data["format"] != cls.name:
            raise InvalidInputError(f"Not the settings of an affine format: {dict(data)!r}.")
        bits, group_size, dtype = data["bits"], data["group_size"], data["scale_dtype"]
        if type(bits) is not int or type(group_size) is not int or dtype not in SCALE_DTYPES:
            raise InvalidInputError(f"Wrong settings of an affine format: {dict(data)!r}.")
        return cls(bits, group_size, SCALE_DTYPES[dtype])


@lru_cache(maxsize=4096)
def block_width(bits: int, group_size: int, in_features: int) -> int:
    """Codes per plane of a block; see the order of the codes at the top of this file."""
    planes = PLANES[bits]
    widths = [
        width
        for width in (64, 32, 16, 8, 4, 2)
        if planes * width <= _MAX_BLOCK and (group_size == 0 or width <= group_size)
    ]
    padding = {width: -in_features % (planes * width) for width in widths}
    for width in widths:
        if 32 * padding[width] <= in_features:
            return width
    return min(widths, key=lambda width: (padding[width], -width))


def words_per_row(bits: int, group_size: int, in_features: int) -> int:
    """Number of `low` words (and of `high` words) of one output channel."""
    width = block_width(bits, group_size, in_features)
    block = width * PLANES[bits]
    return -(-in_features // block) * width // 2


def num_groups(group_size: int, in_features: int) -> int:
    """Number of groups along in_features; the last one may be short."""
    return -(-in_features // group_size) if group_size else 1


class AffineFormat:
    """The affine format's functions; settings come as an `AffineSpec`."""

    name = AffineSpec.name

    def spec_from_json(self, data: Mapping[str, Any]) -> AffineSpec:
        """See `AffineSpec.from_json`."""
        return AffineSpec.from_json(data)

    def tensor_specs(self, spec: AffineSpec, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight [out_features, in_features]."""
        if out_features < 1 or in_features < 1:
            raise InvalidInputError(f"A weight [{out_features}, {in_features}] has no elements to store.")
        words = words_per_row(spec.bits, spec.group_size, in_features)
        groups = num_groups(spec.group_size, in_features)
        specs = {"low": TensorSpec((out_features, words), torch.int32)}
        if spec.high_bits:
            specs["high"] = TensorSpec((out_features, words), _HIGH_DTYPE[spec.bits])
        specs["scales"] = TensorSpec((groups, out_features), spec.scale_dtype)
        specs["zeros"] = TensorSpec((groups, out_features), spec.zero_dtype)
        return specs

    def pack(
        self, spec: AffineSpec, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Store codes, scales and zeros.

        Args:
            spec: The format's settings.
            codes: uint8 [N, K], each below 2^bits.
            scales: Floating point [N, groups].
            zeros: Floating point [N, groups], in units of codes.

        Returns:
            The tensors named by `tensor_specs`, contiguous, on the device of `codes`.

        Raises:
            InvalidInputError: Wrong shapes or dtypes, a code that does not fit in `bits`, or a scale or
                zero that is not finite in its stored dtype.
        """
        if codes.dtype != torch.uint8 or codes.dim() != 2:
            raise InvalidInputError(f"Codes must be uint8 [N, K], not {codes.dtype} {list(codes.shape)}.")
        out_features, in_features = codes.shape
        specs = self.tensor_specs(spec, out_features, in_features)
        if spec.bits < 8 and not codes.is_meta and int(codes.max()) >> spec.bits:
            raise InvalidInputError(f"A code of {int(codes.max())} does not fit in {spec.bits} bits.")
        tensors = {}
        blocks = self._blocks(spec, codes, in_features)
        tensors["low"] = _pack_plane(blocks, 0, spec.low_bits, torch.int32)
        if spec.high_bits:
            tensors["high"] = _pack_plane(blocks, spec.low_bits, spec.high_bits, specs["high"].dtype)
        for part, values in (("scales", scales), ("zeros", zeros)):
            stored = values.t().to(specs[part].dtype).contiguous()
            if tuple(stored.shape) != specs[part].shape:
                raise InvalidInputError(
                    f"{part} must be {list(reversed(specs[part].shape))}, not {list(values.shape)}."
                )
            if not stored.is_meta and not bool(torch.isfinite(stored).all()):
                raise InvalidInputError(
                    f"{part} hold a value that is not finite as {stored.dtype}.",
                    hint="Store them as float32 (scale_dtype).",
                )
            tensors[part] = stored
        return tensors

    def unpack(
        self, spec: AffineSpec, tensors: Mapping[str, torch.Tensor], in_features: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Invert `pack`: codes uint8 [N, K], scales and zeros [N, groups] in their stored dtypes."""
        out_features = tensors["low"].shape[0]
        self._check(spec, tensors, out_features, in_features)
        codes = _unpack_codes(spec, tensors["low"], tensors.get("high"), in_features)
        return codes, tensors["scales"].t(), tensors["zeros"].t()

    def dequantize(
        self, spec: AffineSpec, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [N, K] = (code − zero) · scale, computed in float32 and cast to `dtype`."""
        self._check(spec, tensors, tensors["low"].shape[0], in_features)
        return dequantize_affine(
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            spec.bits,
            spec.group_size,
            in_features,
        ).to(dtype)

    def concat(
        self, spec: AffineSpec, parts: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Weights of equal in_features and settings side by side along out_features.

        Raises:
            InvalidInputError: No parts, or parts whose in_features differ.
        """
        if not parts:
            raise InvalidInputError("There is nothing to concatenate.")
        names = ["low", "high", "scales", "zeros"] if spec.high_bits else ["low", "scales", "zeros"]
        joined = {}
        for part in names:
            dim = 0 if part in ("low", "high") else 1
            if len({tensors[part].shape[1 - dim] for tensors in parts}) != 1:
                raise InvalidInputError("Weights of different in_features cannot stand side by side.")
            joined[part] = torch.cat([tensors[part] for tensors in parts], dim=dim).contiguous()
        return joined

    def nbytes(self, spec: AffineSpec, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight: codes, padding, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.tensor_specs(spec, out_features, in_features).values())

    def padding_bits(self, spec: AffineSpec, out_features: int, in_features: int) -> int:
        """Bits of `nbytes` that hold padding codes rather than codes, scales or zeros."""
        stored = words_per_row(spec.bits, spec.group_size, in_features) * (32 // spec.low_bits)
        return out_features * (stored - in_features) * spec.bits

    def bits_per_weight(self, spec: AffineSpec, out_features: int, in_features: int) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes(spec, out_features, in_features) / (out_features * in_features)

    def op_call(
        self, spec: AffineSpec, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::linear_affine` and its arguments for `linear(x, weight, bias)`.

        `x`, `bias` and the values of `tensors` may be tensors or graph nodes.
        """
        import qcompiler.kernels.ops.linear_affine  # noqa: F401  (registers the op)

        arguments = (
            x,
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            bias,
            spec.bits,
            spec.group_size,
            in_features,
        )
        return torch.ops.qcompiler.linear_affine.default, arguments

    def grouped_tensor_specs(
        self, spec: AffineSpec, experts: int, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `GroupedFormat`."""
        return self.tensor_specs(spec, experts * out_features, in_features)

    def grouped_op_call(
        self, spec: AffineSpec, x: Any, tensors: Mapping[str, Any], offsets: Any, bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::grouped_linear_affine` and its arguments; see `GroupedFormat`."""
        import qcompiler.kernels.ops.grouped_linear_affine  # noqa: F401  (registers the op)

        arguments = (
            x,
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            offsets,
            bias,
            spec.bits,
            spec.group_size,
            in_features,
        )
        return torch.ops.qcompiler.grouped_linear_affine.default, arguments

    def embedding_op_call(
        self, spec: AffineSpec, ids: Any, tensors: Mapping[str, Any], embedding_dim: int, dtype: torch.dtype
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::embedding_affine` and its arguments; see `EmbeddingFormat`."""
        import qcompiler.kernels.ops.embedding_affine  # noqa: F401  (registers the op)

        arguments = (
            ids,
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            spec.bits,
            spec.group_size,
            embedding_dim,
            dtype,
        )
        return torch.ops.qcompiler.embedding_affine.default, arguments

    def _check(
        self, spec: AffineSpec, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
    ) -> None:
        for part, wanted in self.tensor_specs(spec, out_features, in_features).items():
            tensor = tensors.get(part)
            if tensor is None or tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise InvalidInputError(
                    f"Affine tensor {part!r} is {found}; {spec.bits} bits, group size {spec.group_size} and "
                    f"in_features {in_features} need {wanted.dtype} {list(wanted.shape)}."
                )

    def _blocks(self, spec: AffineSpec, codes: torch.Tensor, in_features: int) -> torch.Tensor:
        """Codes as uint8 [N, blocks, planes, width/2, 2], zero-padded at the end of K."""
        width = block_width(spec.bits, spec.group_size, in_features)
        planes = 16 // spec.low_bits
        padding = -in_features % (planes * width)
        padded = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
        return padded.reshape(codes.shape[0], -1, planes, width // 2, 2)


def _pack_plane(blocks: torch.Tensor, shift: int, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Bits [shift, shift+bits) of the codes [N, blocks, planes, width/2, 2] as words [N, words]."""
    planes = blocks.shape[2]
    words = torch.zeros((*blocks.shape[:2], blocks.shape[3]), dtype=torch.int32, device=blocks.device)
    mask = (1 << bits) - 1
    for half in range(2):
        for plane in range(planes):
            part = (blocks[:, :, plane, :, half] >> shift) & mask
            words |= part.to(torch.int32) << (half * planes * bits + plane * bits)
    return words.to(dtype).flatten(1)


def _unpack_plane(words: torch.Tensor, planes: int, width: int, bits: int) -> torch.Tensor:
    """Invert `_pack_plane`: uint8 [N, blocks, planes, width/2, 2] with values below 2^bits."""
    blocks = words.reshape(words.shape[0], 2 * words.shape[1] // width, width // 2).to(torch.int32)
    codes = torch.empty((*blocks.shape[:2], planes, width // 2, 2), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for half in range(2):
        for plane in range(planes):
            codes[:, :, plane, :, half] = ((blocks >> (half * planes * bits + plane * bits)) & mask).to(
                torch.uint8
            )
    return codes


def _unpack_codes(
    spec: AffineSpec, low: torch.Tensor, high: torch.Tensor | None, in_features: int
) -> torch.Tensor:
    width = block_width(spec.bits, spec.group_size, in_features)
    planes = 16 // spec.low_bits
    codes = _unpack_plane(low, planes, width, spec.low_bits)
    if high is not None:
        codes |= _unpack_plane(high, planes, width, spec.high_bits) << spec.low_bits
    return codes.flatten(1)[:, :in_features].contiguous()


def dequantize_affine(
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """The float32 weight [N, in_features] of the stored tensors: what every kernel must compute with."""
    codes = _unpack_codes(AffineSpec(bits, group_size), low, high, in_features)
    weight = codes.to(torch.float32)
    size = group_size or in_features
    whole = in_features // size * size
    grouped = weight[:, :whole].unflatten(1, (whole // size, size))
    count = grouped.shape[1]
    grouped.sub_(zeros[:count].t().float()[:, :, None]).mul_(scales[:count].t().float()[:, :, None])
    if whole < in_features:
        weight[:, whole:].sub_(zeros[-1, :, None].float()).mul_(scales[-1, :, None].float())
    return weight


AFFINE = AffineFormat()
register_format(AFFINE)
