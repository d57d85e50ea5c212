"""lut4: 4-bit codes into a table of 16 values, one absmax per block (NF4, FP4: Dettmers et al. 2023, QLoRA).

    w[i] = table[code[i]] · absmax[i // block_size],   i runs over the weight [N, K] row after row

Stored tensors, byte for byte those of the bitsandbytes package:

- `codes`  uint8 [N, K/2]: the even element of a pair in the high nibble;
- `absmax` float32 [N, K/block_size], or [ceil(N·K/block_size)] where blocks run across the ends of rows.

Double quantization stores absmax in 8 bits: a code into the 256 values of the dynamic map
(Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning"), in blocks of 256:

    absmax[b] = map[code[b]] · nested_absmax[b // 256] + nested_offset

- `absmax` uint8, `nested_absmax` float32 [ceil(blocks/256)], `nested_offset` float32 [1] (the mean);
- `part_rows` int32 [1] = N: weights laid side by side keep their own blocks and offset, and this says
  where each begins. It is also there where blocks cross rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import TensorSpec, register_format

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256

# NF4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: sign, two exponent bits, one mantissa bit, in units of the largest value; see `table`.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
QUANT_TYPES = ("nf4", "fp4")


@cache
def table(quant_type: str) -> torch.Tensor:
    """The 16 values of `nf4` or `fp4` by code: float32 on the CPU, the largest magnitude 1."""
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if quant_type == "fp4":
        magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32) / max(_FP4_MAGNITUDES)
        return torch.cat([magnitudes, -magnitudes])
    raise InvalidInputError(f"There is no 4-bit table {quant_type!r}.", hint="Choose nf4 or fp4.")


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic data type, ascending, float32 on the CPU.

    Decade e of seven (10^(e-6)) holds 2^e values per sign, the midpoints of an even cut of
    [0.1, 1] of that decade; zero and one complete the 256.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(frozen=True)
class Lut4Spec:
    """Settings of the lut4 format.

    Args:
        quant_type: The table: "nf4" or "fp4".
        block_size: Weights that share an absmax: a power of two from 32 to 4096.
        double_quant: Store absmax in 8 bits.

    Raises:
        InvalidInputError: A setting outside of these.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    name = "lut4"
    bits = 4

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise InvalidInputError(
                f"There is no 4-bit table {self.quant_type!r}.", hint=f"Choose from {QUANT_TYPES}."
            )
        if self.block_size not in BLOCK_SIZES:
            raise InvalidInputError(
                f"The lut4 format has no block size {self.block_size}.", hint=f"Choose from {BLOCK_SIZES}."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; `from_json` reads it back."""
        return {
            "format": self.name,
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lut4Spec:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: A missing, unknown or wrong entry.
        """
        types = {"format": str, "quant_type": str, "block_size": int, "double_quant": bool}
        wrong = set(data) != set(types) or any(type(data[key]) is not kind for key, kind in types.items())
        if wrong or data["format"] != cls.name:
            raise InvalidInputError(f"Not the settings of a lut4 format: {dict(data)!r}.")
        return cls(data["quant_type"], data["block_size"], data["double_quant"])


class Lut4Format:
    """The lut4 format's functions; settings come as a `Lut4Spec`."""

    name = Lut4Spec.name

    def spec_from_json(self, data: Mapping[str, Any]) -> Lut4Spec:
        """See `Lut4Spec.from_json`."""
        return Lut4Spec.from_json(data)

    def tensor_specs(self, spec: Lut4Spec, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight [out_features, in_features].

        Raises:
            InvalidInputError: No elements, or an odd in_features: rows would share bytes.
        """
        if out_features < 1 or in_features < 1:
            raise InvalidInputError(f"A weight [{out_features}, {in_features}] has no elements to store.")
        if in_features % 2:
            raise InvalidInputError(
                f"The lut4 format stores two elements of a row in a byte; in_features is {in_features}, odd.",
                hint="Leave this layer out (--skip), or choose another method for it.",
            )
        blocks = num_blocks(spec.block_size, out_features, in_features)
        crossing = in_features % spec.block_size != 0
        shape = (blocks,) if crossing else (out_features, in_features // spec.block_size)
        specs = {
            "codes": TensorSpec((out_features, in_features // 2), torch.uint8),
            "absmax": TensorSpec(shape, torch.uint8 if spec.double_quant else torch.float32),
        }
        if spec.double_quant:
            specs["nested_absmax"] = TensorSpec((-(-blocks // NESTED_BLOCK),), torch.float32)
            specs["nested_offset"] = TensorSpec((1,), torch.float32)
        if spec.double_quant or crossing:
            specs["part_rows"] = TensorSpec((1,), torch.int32)
        return specs

    def pack(
        self,
        spec: Lut4Spec,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        nested_absmax: torch.Tensor | None = None,
        nested_offset: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Store codes and statistics.

        Args:
            spec: The format's settings.
            codes: uint8 [N, K], each below 16.
            absmax: [blocks] in the order of the flattened weight: float32, or uint8 codes into the
                dynamic map with double quantization.
            nested_absmax: float32 [ceil(blocks/256)] with double quantization.
            nested_offset: float32, one element, with double quantization.

        Returns:
            The tensors named by `tensor_specs`, contiguous, on the device of `codes`.

        Raises:
            InvalidInputError: Wrong shapes or dtypes, a code above 15, or statistics that are not finite.
        """
        if codes.dtype != torch.uint8 or codes.dim() != 2:
            raise InvalidInputError(f"Codes must be uint8 [N, K], not {codes.dtype} {list(codes.shape)}.")
        rows, columns = codes.shape
        specs = self.tensor_specs(spec, rows, columns)
        if not codes.is_meta and int(codes.max()) > 15:
            raise InvalidInputError(f"A code of {int(codes.max())} does not fit in 4 bits.")
        found: dict[str, torch.Tensor | None] = {
            "codes": (codes[:, ::2] << 4) | codes[:, 1::2],
            "absmax": absmax,
            "nested_absmax": nested_absmax,
            "nested_offset": nested_offset,
            "part_rows": torch.tensor([rows], dtype=torch.int32, device=codes.device),
        }
        tensors = {}
        for part, wanted in specs.items():
            given = found[part]
            if given is None or given.dtype != wanted.dtype or given.numel() != _numel(wanted.shape):
                told = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise InvalidInputError(
                    f"{part} is {told}; it must be {wanted.dtype} with {_numel(wanted.shape)} elements."
                )
            if wanted.dtype == torch.float32 and not given.is_meta and not bool(torch.isfinite(given).all()):
                raise InvalidInputError(f"{part} holds a value that is not finite.")
            tensors[part] = given.reshape(wanted.shape).contiguous()
        return tensors

    def unpack(
        self, spec: Lut4Spec, tensors: Mapping[str, torch.Tensor], in_features: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 [N, K] and absmax float32 [blocks], double quantization undone."""
        self._check(spec, tensors, in_features)
        packed = tensors["codes"]
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
        parts = _parts(packed, tensors.get("part_rows"))
        absmax = dequantize_absmax(
            tensors["absmax"],
            tensors.get("nested_absmax"),
            tensors.get("nested_offset"),
            [num_blocks(spec.block_size, rows, in_features) for rows in parts],
        )
        return codes, absmax

    def dequantize(
        self, spec: Lut4Spec, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [N, K] = table[code] · absmax, computed in float32 and cast to `dtype`."""
        if tensors["codes"].is_meta:
            return tensors["codes"].new_empty((tensors["codes"].shape[0], in_features), dtype=dtype)
        self._check(spec, tensors, in_features)
        return dequantize_lut4(
            tensors["codes"],
            tensors["absmax"],
            tensors.get("nested_absmax"),
            tensors.get("nested_offset"),
            tensors.get("part_rows"),
            spec.quant_type,
            spec.block_size,
            in_features,
        ).to(dtype)

    def concat(self, spec: Lut4Spec, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Weights of equal in_features and settings side by side along out_features; exact.

        Each tensor is the parts' tensors one after the other; `part_rows` says where a part begins.

        Raises:
            InvalidInputError: No parts, or parts whose tensors or in_features differ.
        """
        if not parts:
            raise InvalidInputError("There is nothing to concatenate.")
        same = all(
            set(tensors) == set(parts[0])
            and all(t.shape[1:] == parts[0][n].shape[1:] for n, t in tensors.items())
            for tensors in parts
        )
        if not same:
            raise InvalidInputError("Weights of different in_features or settings cannot stand side by side.")
        return {part: torch.cat([tensors[part] for tensors in parts]) for part in parts[0]}

    def nbytes(self, spec: Lut4Spec, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight: codes and all statistics."""
        return sum(tensor.nbytes for tensor in self.tensor_specs(spec, out_features, in_features).values())

    def bits_per_weight(self, spec: Lut4Spec, out_features: int, in_features: int) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes(spec, out_features, in_features) / (out_features * in_features)

    def op_call(
        self, spec: Lut4Spec, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::linear_lut4` and its arguments for `linear(x, weight, bias)`.

        `x`, `bias` and the values of `tensors` may be tensors or graph nodes.
        """
        import qcompiler.kernels.ops.linear_lut4  # noqa: F401  (registers the op)

        arguments = (
            x,
            tensors["codes"],
            tensors["absmax"],
            tensors.get("nested_absmax"),
            tensors.get("nested_offset"),
            tensors.get("part_rows"),
            bias,
            spec.quant_type,
            spec.block_size,
            in_features,
        )
        return torch.ops.qcompiler.linear_lut4.default, arguments

    def grouped_tensor_specs(
        self, spec: Lut4Spec, experts: int, out_features: int, in_features: int
    ) -> dict[str, TensorSpec]:
        """See `GroupedFormat`; every expert is a part with its own blocks."""
        one = self.tensor_specs(spec, out_features, in_features)
        return {
            name: TensorSpec((experts * tensor.shape[0], *tensor.shape[1:]), tensor.dtype)
            for name, tensor in one.items()
        }

    def grouped_op_call(
        self, spec: Lut4Spec, x: Any, tensors: Mapping[str, Any], offsets: Any, bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::grouped_linear_lut4` and its arguments; see `GroupedFormat`."""
        import qcompiler.kernels.ops.grouped_linear_lut4  # noqa: F401  (registers the op)

        parts = ("codes", "absmax", "nested_absmax", "nested_offset", "part_rows")
        settings = (spec.quant_type, spec.block_size, in_features)
        arguments = (x, *map(tensors.get, parts), offsets, bias, *settings)
        return torch.ops.qcompiler.grouped_linear_lut4.default, arguments

    def _check(self, spec: Lut4Spec, tensors: Mapping[str, torch.Tensor], in_features: int) -> None:
        codes = tensors.get("codes")
        if codes is None or codes.dim() != 2:
            raise InvalidInputError("lut4 tensor 'codes' is missing or not a matrix.")
        whole = self.tensor_specs(spec, codes.shape[0], in_features)
        rows = _parts(codes, tensors.get("part_rows"))
        each = [self.tensor_specs(spec, count, in_features) for count in rows]
        for part, first in whole.items():
            shape = (sum(specs[part].shape[0] for specs in each), *first.shape[1:])
            tensor = tensors.get(part)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != first.dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise InvalidInputError(
                    f"lut4 tensor {part!r} is {found}; in_features {in_features} and block size "
                    f"{spec.block_size} need {first.dtype} {list(shape)}."
                )


def num_blocks(block_size: int, out_features: int, in_features: int) -> int:
    """Blocks of a weight; the last one may be short."""
    return -(-out_features * in_features // block_size)


def dequantize_absmax(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_blocks: Sequence[int],
) -> torch.Tensor:
    """float32 absmax [blocks], parts after each other; `part_blocks` are the blocks of each part."""
    flat = absmax.flatten()
    if nested_absmax is None or nested_offset is None:
        return flat
    values = dynamic_map().to(flat.device)[flat.int()]
    nested = [-(-blocks // NESTED_BLOCK) for blocks in part_blocks]
    pieces = zip(
        values.split(list(part_blocks)), nested_absmax.split(nested), nested_offset.split(1), strict=True
    )
    return torch.cat(
        [
            piece * scales.repeat_interleave(NESTED_BLOCK)[: piece.numel()] + offset
            for piece, scales, offset in pieces
        ]
    )


def dequantize_lut4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """The float32 weight [N, in_features] of these tensors: the definition that every kernel must meet."""
    parts = _parts(codes, part_rows)
    blocks = [num_blocks(block_size, rows, in_features) for rows in parts]
    scales = dequantize_absmax(absmax, nested_absmax, nested_offset, blocks)
    values = table(quant_type).to(codes.device)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    weight = pairs[codes.int()].flatten(1)
    if in_features % block_size == 0:
        weight.view(-1, block_size).mul_(scales[:, None])
        return weight
    for part, part_scales in zip(weight.split(parts), scales.split(blocks), strict=True):
        part.view(-1).mul_(part_scales.repeat_interleave(block_size)[: part.numel()])
    return weight


def _parts(codes: torch.Tensor, part_rows: torch.Tensor | None) -> list[int]:
    if part_rows is None:
        return [codes.shape[0]]
    rows = [int(count) for count in part_rows.tolist()]
    if min(rows, default=0) < 1 or sum(rows) != codes.shape[0]:
        raise InvalidInputError(f"part_rows {rows} do not add up to {codes.shape[0]} rows.")
    return rows


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


LUT4 = Lut4Format()
register_format(LUT4)
