"""body_tail: an affine body for most weights and a few log-coded corrections, the tail, for the largest.

    w[n, k] = (code[n, k] − zero) · scale  +  Σ over the slots of row n that name column k of ±t
    t       = tail_scales[n] · 2^((m − m_max) · step),  0 for m = 0

The body is the affine format (`formats/affine.py`) with its tensors `low`, `high`, `scales` and
`zeros`. A tail weight keeps its body code, the end of the range that it lies beyond, and a slot of
the tail holds what is missing: a sign and the logarithm of a magnitude, `tail_bits` together.

K is cut into equal blocks of at most 2^(16 − tail_bits) columns (the last may be shorter), and every
row has as many slots in each; `tail_layout` gives both from `tail_fraction`. Further tensors:

- `tail`        int16 [blocks·slots, N]: slot t belongs to block t // slots. From bit 0 on a word holds
                16 − tail_bits bits of position in the block, tail_bits − 1 bits of m, and a sign;
- `tail_scales` [N] in the dtype of the scales: the row's largest correction.

The range of a row is 8 octaves: step = 8 / 2^(tail_bits − 1), m_max = 2^(tail_bits − 1) − 1. Slots that
a short block does not need have m = 0; a position past the end of K means nothing. The slots of a
block stand in ascending order of position.

Why slots: bits that the position of one tail weight takes, for tails of 0.5 to 2 % of the weights:

| layout                                  | 0.5 % | 1 %  | 2 % |
|-----------------------------------------|-------|------|-----|
| bitmap                                  | 200   | 100  | 50  |
| sorted 16-bit offsets and row starts    | 16    | 16   | 16  |
| entropy of free positions               | 9.1   | 8.1  | 7.1 |
| slots, 8-bit codes, blocks ≤ 256        | 8     | 8    | 8   |

Slots cost least of what can be addressed without decoding a stream, need no row starts, and give
every row the same number of entries: a kernel's programs do equal work, and slot t of neighbouring
rows is one contiguous read. The price is that a block cannot have more tail weights than slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, SCALE_DTYPES, AffineSpec, dequantize_affine
from qcompiler.kernels.formats.base import TensorSpec, register_format

TAIL_BITS = (4, 5, 6, 7, 8)
OCTAVES = 8.0
LARGEST_FRACTION = 0.25


@dataclass(frozen=True)
class BodyTailSpec:
    """Settings of the body_tail format.

    Args:
        bits: Bits per code of the body: 2, 3, 4, 5, 6 or 8.
        group_size: Codes that share a scale, as in the affine format.
        tail_fraction: About how many of the weights are tail: above 0, at most 0.25.
        tail_bits: Bits of a correction, sign and logarithm: 4 to 8.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        InvalidInputError: A setting outside of these.
    """

    bits: int
    group_size: int = 64
    tail_fraction: float = 0.005
    tail_bits: int = 8
    scale_dtype: torch.dtype = torch.float16

    name = "body_tail"

    def __post_init__(self) -> None:
        AffineSpec(self.bits, self.group_size, self.scale_dtype)
        if self.tail_bits not in TAIL_BITS:
            raise InvalidInputError(
                f"The body_tail format has no {self.tail_bits}-bit tail.", hint=f"Choose from {TAIL_BITS}."
            )
        if not 0 < self.tail_fraction <= LARGEST_FRACTION:  # also catches NaN
            raise InvalidInputError(
                f"The body_tail format has no tail of {self.tail_fraction} of the weights.",
                hint=f"Choose a fraction above 0, up to {LARGEST_FRACTION}.",
            )

    @property
    def body(self) -> AffineSpec:
        """Settings of the body."""
        return AffineSpec(self.bits, self.group_size, self.scale_dtype)

    @property
    def position_bits(self) -> int:
        """Bits of a slot that hold a position."""
        return 16 - self.tail_bits

    @property
    def levels(self) -> int:
        """The largest magnitude code, m_max."""
        return (1 << (self.tail_bits - 1)) - 1

    @property
    def step(self) -> float:
        """Octaves between neighbouring magnitudes."""
        return OCTAVES / (1 << (self.tail_bits - 1))

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; `from_json` reads it back."""
        return {
            "format": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "tail_fraction": self.tail_fraction,
            "tail_bits": self.tail_bits,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BodyTailSpec:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: A missing, unknown or wrong entry.
        """
        expected = {"format", "bits", "group_size", "tail_fraction", "tail_bits", "scale_dtype"}
        if set(data) != expected or data["format"] != cls.name:
            raise InvalidInputError(f"Not the settings of a body_tail format: {dict(data)!r}.")
        numbers = (data["bits"], data["group_size"], data["tail_fraction"], data["tail_bits"])
        types = (int, int, float, int)
        if tuple(map(type, numbers)) != types or data["scale_dtype"] not in SCALE_DTYPES:
            raise InvalidInputError(f"Wrong settings of a body_tail format: {dict(data)!r}.")
        return cls(*numbers, SCALE_DTYPES[data["scale_dtype"]])


def tail_layout(spec: BodyTailSpec, in_features: int) -> tuple[int, int, int]:
    """Blocks of a row, slots and columns of a block.

    As few blocks as positions allow, each with the slots that `tail_fraction` of it fill; blocks are made
    smaller where that brings their number times slots nearer to `tail_fraction` of the row.
    """
    fewest = -(-in_features // (1 << spec.position_bits))
    wanted = spec.tail_fraction * in_features
    slots = max(1, int(wanted / fewest))
    block = -(-in_features // max(fewest, round(wanted / slots)))
    return -(-in_features // block), slots, block


class BodyTailFormat:
    """The body_tail format's functions; settings come as a `BodyTailSpec`."""

    name = BodyTailSpec.name

    def spec_from_json(self, data: Mapping[str, Any]) -> BodyTailSpec:
        """See `BodyTailSpec.from_json`."""
        return BodyTailSpec.from_json(data)

    def tensor_specs(self, spec: BodyTailSpec, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight [out_features, in_features]."""
        specs = AFFINE.tensor_specs(spec.body, out_features, in_features)
        blocks, slots, _ = tail_layout(spec, in_features)
        specs["tail"] = TensorSpec((blocks * slots, out_features), torch.int16)
        specs["tail_scales"] = TensorSpec((out_features,), spec.scale_dtype)
        return specs

    def pack(
        self, spec: BodyTailSpec, body: Mapping[str, torch.Tensor], rest: torch.Tensor, chosen: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Store a packed body and the corrections at chosen columns.

        Args:
            spec: The format's settings.
            body: What `AFFINE.pack` gave with `spec.body`.
            rest: Floating point [N, K]: the weight less the body.
            chosen: bool [N, K], at most the slots of a block in each block of a row.

        Returns:
            The tensors named by `tensor_specs`, contiguous, on the device of `rest`.

        Raises:
            InvalidInputError: Wrong shapes, too many columns chosen, or a correction that is not finite.
        """
        rows, columns = rest.shape
        specs = self.tensor_specs(spec, rows, columns)
        if chosen.shape != rest.shape or chosen.dtype != torch.bool:
            raise InvalidInputError(
                f"chosen must be bool {list(rest.shape)}, not {chosen.dtype} {list(chosen.shape)}."
            )
        info = torch.finfo(spec.scale_dtype)
        values = torch.where(chosen, rest.float(), 0.0)
        if not rest.is_meta and not bool(values.isfinite().all()):
            raise InvalidInputError("The tail holds a value that is not finite.")
        scales = values.abs().amax(dim=1).clamp_max(info.max).to(spec.scale_dtype)
        _, slots, block = tail_layout(spec, columns)
        values, chosen = (in_blocks(side, block) for side in (values, chosen))
        if not rest.is_meta and int(chosen.sum(dim=2).max()) > slots:
            raise InvalidInputError(f"More than {slots} tail weights in a block of a row.")
        # The chosen columns in their order; where there are fewer, others, which have nothing to correct.
        order = torch.arange(block, 0, -1, dtype=torch.int32, device=rest.device)
        positions = torch.where(chosen, order, 0).topk(min(slots, block), dim=2).indices
        values = values.gather(2, positions)
        words = _encode(spec, values, scales.float()[:, None, None])
        words = torch.where(words > 0, words | positions, 0)
        stored = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
        tail = stored.flatten(1).t().contiguous()
        tensors = {**body, "tail": tail, "tail_scales": scales.contiguous()}
        _check(specs, tensors, spec)
        return tensors

    def dequantize(
        self, spec: BodyTailSpec, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [N, K], body and tail summed in float32 and cast to `dtype`."""
        low = tensors.get("low")
        rows = low.shape[0] if low is not None else 1
        _check(self.tensor_specs(spec, rows, in_features), tensors, spec)
        weight = dequantize_body_tail(
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            tensors["tail"],
            tensors["tail_scales"],
            spec,
            in_features,
        )
        return weight.to(dtype)

    def concat(
        self, spec: BodyTailSpec, parts: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Weights of equal in_features and settings side by side along out_features.

        Raises:
            InvalidInputError: No parts, or parts whose in_features differ.
        """
        joined = AFFINE.concat(spec.body, parts)
        for part, dim in (("tail", 1), ("tail_scales", 0)):
            joined[part] = torch.cat([tensors[part] for tensors in parts], dim=dim).contiguous()
        return joined

    def nbytes(self, spec: BodyTailSpec, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight: body with padding, scales and zeros; tail codes and positions."""
        return sum(tensor.nbytes for tensor in self.tensor_specs(spec, out_features, in_features).values())

    def tail_nbytes(self, spec: BodyTailSpec, out_features: int, in_features: int) -> int:
        """Bytes of `nbytes` that the tail takes: slots, those not needed included, and a scale per row."""
        return self.nbytes(spec, out_features, in_features) - AFFINE.nbytes(
            spec.body, out_features, in_features
        )

    def bits_per_weight(self, spec: BodyTailSpec, out_features: int, in_features: int) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes(spec, out_features, in_features) / (out_features * in_features)

    def op_call(
        self, spec: BodyTailSpec, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::linear_body_tail` and its arguments for `linear(x, weight, bias)`.

        `x`, `bias` and the values of `tensors` may be tensors or graph nodes.
        """
        import qcompiler.kernels.ops.linear_body_tail  # noqa: F401  (registers the op)

        arguments = (
            x,
            tensors["low"],
            tensors.get("high"),
            tensors["scales"],
            tensors["zeros"],
            tensors["tail"],
            tensors["tail_scales"],
            bias,
            spec.bits,
            spec.group_size,
            spec.tail_fraction,
            spec.tail_bits,
            in_features,
        )
        return torch.ops.qcompiler.linear_body_tail.default, arguments


def in_blocks(side: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K] as [N, blocks, block], padded with zeros."""
    padded = torch.nn.functional.pad(side, (0, -side.shape[1] % block))
    return padded.unflatten(1, (-1, block))


def _encode(spec: BodyTailSpec, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Words without their positions, int32, for corrections of rows whose largest is `scales`."""
    relative = values.abs() / scales.clamp_min(torch.finfo(torch.float32).tiny)
    m = (spec.levels + torch.log2(relative.clamp_min(2.0**-64)) / spec.step).round()
    # Below the smallest magnitude the nearer of it and zero.
    smallest = 2.0 ** ((1 - spec.levels) * spec.step)
    m = torch.where(relative < smallest, (relative > smallest / 2).float(), m.clamp(1, spec.levels))
    codes = m.to(torch.int32)
    sign = ((values < 0) & (codes > 0)).to(torch.int32) << (spec.tail_bits - 1)
    return (codes | sign) << spec.position_bits


def decode_tail(
    tail: torch.Tensor, tail_scales: torch.Tensor, spec: BodyTailSpec, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns int64 and corrections float32, both [slots, N]."""
    words = tail.to(torch.int32) & 0xFFFF
    _, slots, block = tail_layout(spec, in_features)
    start = torch.arange(tail.shape[0], device=tail.device) // slots * block
    columns = start[:, None] + (words & ((1 << spec.position_bits) - 1)).to(torch.int64)
    m = (words >> spec.position_bits) & spec.levels
    # From a table: vectorised and scalar exponentials differ in the last bit.
    powers = torch.exp2((torch.arange(spec.levels + 1, dtype=torch.float64) - spec.levels) * spec.step)
    powers[0] = 0.0
    magnitude = powers.float().to(tail.device)[m] * tail_scales.float()
    return columns, torch.where(words >= 1 << 15, -magnitude, magnitude)


def dequantize_body_tail(
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    tail: torch.Tensor,
    tail_scales: torch.Tensor,
    spec: BodyTailSpec,
    in_features: int,
) -> torch.Tensor:
    """The float32 weight [N, in_features] of the stored tensors: what every kernel must compute with."""
    weight = dequantize_affine(low, high, scales, zeros, spec.bits, spec.group_size, in_features)
    columns, values = decode_tail(tail, tail_scales, spec, in_features)
    values = torch.where(columns < in_features, values, 0.0)
    return weight.scatter_add_(1, columns.clamp_max(in_features - 1).t(), values.t())


def _check(specs: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor], spec: BodyTailSpec) -> None:
    for part, wanted in specs.items():
        tensor = tensors.get(part)
        if tensor is None or tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise InvalidInputError(
                f"body_tail tensor {part!r} is {found}; {spec!r} needs {wanted.dtype} {list(wanted.shape)}."
            )


BODY_TAIL = BodyTailFormat()
register_format(BODY_TAIL)
