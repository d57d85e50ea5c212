"""Additive codebooks (AQLM): each group of consecutive weights is a sum of codewords, times its row's scale.

    w[n, g·d : (g+1)·d] = scales[n] · Σ_m codebooks[p(n), m, code(n, g, m), :]

d = group_size, M codebooks of 2^bits codewords each ("MxB": 2x8 has two of 256). Source: Egiazarian et
al., "Extreme Compression of Large Language Models via Additive Quantization", 2024, eq. 3.

Stored tensors of a weight [N, K], G = ceil(K / d) groups per row:

- `codes`      8 bits: uint8 [N, G·M]; 16 bits: int16 [N, G·M] (two's complement of the unsigned code);
               other widths: uint8 [N, ceil(G·M·bits / 8)], a row's codes as a little-endian bit stream.
               Code (g, m) of a row is its code number g·M + m in all three.
- `codebooks`  float16 [P, M, 2^bits, d]
- `scales`     float16 [N]
- `rows`       int32 [P]: how many consecutive rows use each set of codebooks; sums to N.

P is 1 for a weight as quantized. Siblings side by side (`concat`) keep their own codebooks, P sets of
them, so that joining them changes no number; every tensor is joined along dimension 0.
The columns past K of the last group are stored but stand for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import TensorSpec, register_format

GROUP_SIZES = (4, 8, 16)
MIN_BITS, MAX_BITS = 2, 16
MAX_CODEBOOKS = 8

_PARTS = ("codes", "codebooks", "scales", "rows")


@dataclass(frozen=True)
class AdditiveSpec:
    """Settings of the additive format.

    Args:
        codebooks: Codewords summed per group (M), 1 to 8.
        bits: Bits per code (B), 2 to 16.
        group_size: Consecutive weights per codeword: 4, 8 or 16.

    Raises:
        InvalidInputError: A setting outside of these.
    """

    codebooks: int = 2
    bits: int = 8
    group_size: int = 8

    name = "additive"

    def __post_init__(self) -> None:
        if not 1 <= self.codebooks <= MAX_CODEBOOKS:
            raise InvalidInputError(
                f"The additive format has no {self.codebooks} codebooks.",
                hint=f"Choose 1 to {MAX_CODEBOOKS}, e.g. 2x8.",
            )
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise InvalidInputError(
                f"The additive format has no {self.bits}-bit codes.",
                hint=f"Choose {MIN_BITS} to {MAX_BITS} bits per code, e.g. 2x8 or 1x16.",
            )
        if self.group_size not in GROUP_SIZES:
            raise InvalidInputError(
                f"The additive format has no group size {self.group_size}.",
                hint=f"Choose from {GROUP_SIZES}.",
            )

    @classmethod
    def parse(cls, scheme: str, group_size: int = 8) -> AdditiveSpec:
        """Read "MxB", e.g. "2x8".

        Raises:
            InvalidInputError: Not of that form, or out of range.
        """
        count, x, bits = scheme.partition("x")
        if not (x and count.isascii() and count.isdigit() and bits.isascii() and bits.isdigit()):
            raise InvalidInputError(
                f"{scheme!r} is not a codebook scheme.", hint="Write codebooks x bits, e.g. 2x8 or 1x16."
            )
        return cls(int(count), int(bits), group_size)

    @property
    def scheme(self) -> str:
        """As "MxB"."""
        return f"{self.codebooks}x{self.bits}"

    @property
    def codewords(self) -> int:
        """Codewords per codebook, 2^bits."""
        return 1 << self.bits

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; `from_json` reads it back."""
        return {
            "format": self.name,
            "codebooks": self.codebooks,
            "bits": self.bits,
            "group_size": self.group_size,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdditiveSpec:
        """Read what `to_json` wrote.

        Raises:
            InvalidInputError: A missing, unknown or wrong entry.
        """
        expected = {"format", "codebooks", "bits", "group_size"}
        if set(data) != expected or data["format"] != cls.name:
            raise InvalidInputError(f"Not the settings of an additive format: {dict(data)!r}.")
        values = (data["codebooks"], data["bits"], data["group_size"])
        if any(type(value) is not int for value in values):
            raise InvalidInputError(f"Wrong settings of an additive format: {dict(data)!r}.")
        return cls(*values)


def code_columns(codebooks: int, bits: int, groups: int) -> int:
    """Elements of one row of `codes`."""
    count = groups * codebooks
    return count if bits in (8, 16) else -(-count * bits // 8)


def code_dtype(bits: int) -> torch.dtype:
    """Element type of `codes`."""
    return torch.int16 if bits == 16 else torch.uint8


def num_groups(group_size: int, in_features: int) -> int:
    """Groups of a row; the last may reach past in_features."""
    return -(-in_features // group_size)


class AdditiveFormat:
    """The additive format's functions; settings come as an `AdditiveSpec`."""

    name = AdditiveSpec.name

    def spec_from_json(self, data: Mapping[str, Any]) -> AdditiveSpec:
        """See `AdditiveSpec.from_json`."""
        return AdditiveSpec.from_json(data)

    def tensor_specs(
        self, spec: AdditiveSpec, out_features: int, in_features: int, sets: int = 1
    ) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors of a weight [out_features, in_features].

        Args:
            spec: The format's settings.
            out_features: Rows.
            in_features: Columns.
            sets: Sets of codebooks (P): more than one after `concat`.
        """
        if out_features < 1 or in_features < 1:
            raise InvalidInputError(f"A weight [{out_features}, {in_features}] has no elements to store.")
        groups = num_groups(spec.group_size, in_features)
        columns = code_columns(spec.codebooks, spec.bits, groups)
        return {
            "codes": TensorSpec((out_features, columns), code_dtype(spec.bits)),
            "codebooks": TensorSpec((sets, spec.codebooks, spec.codewords, spec.group_size), torch.float16),
            "scales": TensorSpec((out_features,), torch.float16),
            "rows": TensorSpec((sets,), torch.int32),
        }

    def pack(
        self, spec: AdditiveSpec, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Store codes, codebooks and scales.

        Args:
            spec: The format's settings.
            codes: Integers [N, G, M], each in [0, 2^bits).
            codebooks: Floating point [M, 2^bits, group_size].
            scales: Floating point [N].

        Returns:
            The tensors named by `tensor_specs`, contiguous, on the device of `codes`.

        Raises:
            InvalidInputError: Wrong shapes, a code out of range, or a codeword or scale that is not finite
                as float16.
        """
        if codes.dim() != 3 or codes.dtype.is_floating_point or codes.shape[2] != spec.codebooks:
            raise InvalidInputError(
                f"Codes must be integers [N, groups, {spec.codebooks}], not {codes.dtype} "
                f"{list(codes.shape)}."
            )
        if not codes.is_meta and bool(((codes < 0) | (codes >= spec.codewords)).any()):
            raise InvalidInputError(f"A code does not fit in {spec.bits} bits.")
        specs = self.tensor_specs(spec, codes.shape[0], codes.shape[1] * spec.group_size)
        tensors = {"codes": _pack_codes(codes.flatten(1), spec.bits)}
        for part, values in (("codebooks", codebooks.unsqueeze(0)), ("scales", scales)):
            if tuple(values.shape) != specs[part].shape:
                raise InvalidInputError(
                    f"{part} must be {list(specs[part].shape)}, not {list(values.shape)}."
                )
            stored = values.to(device=codes.device, dtype=torch.float16).contiguous()
            if not stored.is_meta and not bool(torch.isfinite(stored).all()):
                raise InvalidInputError(
                    f"{part} hold a value that is not finite as float16.",
                    hint="Move magnitude between the scales and the codebooks.",
                )
            tensors[part] = stored
        tensors["rows"] = torch.full((1,), codes.shape[0], dtype=torch.int32, device=codes.device)
        return tensors

    def unpack(
        self, spec: AdditiveSpec, tensors: Mapping[str, torch.Tensor], in_features: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes int32 [N, G, M], codebooks float16 [P, M, 2^bits, d], scales float16 [N]."""
        self._check(spec, tensors, in_features)
        groups = num_groups(spec.group_size, in_features)
        codes = unpack_codes(tensors["codes"], spec.codebooks, spec.bits, groups)
        return codes, tensors["codebooks"], tensors["scales"]

    def dequantize(
        self, spec: AdditiveSpec, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight [N, K], summed and scaled in float32 and cast to `dtype`."""
        self._check(spec, tensors, in_features)
        return dequantize_additive(
            tensors["codes"],
            tensors["codebooks"],
            tensors["scales"],
            tensors["rows"],
            spec.bits,
            in_features,
        ).to(dtype)

    def concat(
        self, spec: AdditiveSpec, parts: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Weights of equal in_features and settings side by side; each keeps its codebooks.

        Raises:
            InvalidInputError: No parts, or parts whose in_features or codebooks differ in shape.
        """
        if not parts:
            raise InvalidInputError("There is nothing to concatenate.")
        for part in _PARTS:
            if len({tuple(tensors[part].shape[1:]) for tensors in parts}) != 1:
                raise InvalidInputError(
                    f"Weights whose {part} differ in shape cannot stand side by side.",
                    hint="They need equal in_features and equal settings.",
                )
        return {part: torch.cat([tensors[part] for tensors in parts]).contiguous() for part in _PARTS}

    def nbytes(self, spec: AdditiveSpec, out_features: int, in_features: int, sets: int = 1) -> int:
        """Stored bytes of one weight: codes, their padding, codebooks, scales and row counts."""
        specs = self.tensor_specs(spec, out_features, in_features, sets)
        return sum(tensor.nbytes for tensor in specs.values())

    def bits_per_weight(
        self, spec: AdditiveSpec, out_features: int, in_features: int, sets: int = 1
    ) -> float:
        """8 · nbytes / (out_features · in_features)."""
        return 8 * self.nbytes(spec, out_features, in_features, sets) / (out_features * in_features)

    def op_call(
        self, spec: AdditiveSpec, x: Any, tensors: Mapping[str, Any], bias: Any, in_features: int
    ) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """`qcompiler::linear_additive` and its arguments for `linear(x, weight, bias)`.

        `x`, `bias` and the values of `tensors` may be tensors or graph nodes.
        """
        import qcompiler.kernels.ops.linear_additive  # noqa: F401  (registers the op)

        stored = tuple(tensors[part] for part in _PARTS)
        return torch.ops.qcompiler.linear_additive.default, (x, *stored, bias, spec.bits, in_features)

    def _check(self, spec: AdditiveSpec, tensors: Mapping[str, torch.Tensor], in_features: int) -> None:
        absent = [part for part in _PARTS if part not in tensors]
        if absent:
            raise InvalidInputError(f"Additive tensor {absent[0]!r} is missing.")
        specs = self.tensor_specs(
            spec, tensors["codes"].shape[0], in_features, sets=max(1, tensors["rows"].numel())
        )
        for part, wanted in specs.items():
            tensor = tensors[part]
            if tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
                raise InvalidInputError(
                    f"Additive tensor {part!r} is {tensor.dtype} {list(tensor.shape)}; {spec.scheme} in "
                    f"groups of {spec.group_size} and in_features {in_features} need {wanted.dtype} "
                    f"{list(wanted.shape)}."
                )
        rows = tensors["rows"]
        if not rows.is_meta and (int(rows.sum()) != tensors["codes"].shape[0] or bool((rows < 1).any())):
            raise InvalidInputError(
                f"Additive tensor 'rows' {rows.tolist()} does not divide {tensors['codes'].shape[0]} rows."
            )


def to_aqlm(
    spec: AdditiveSpec, tensors: Mapping[str, torch.Tensor], in_features: int
) -> dict[str, torch.Tensor]:
    """The same weight in the aqlm package's layout.

    Returns:
        `codes` int8 or int16 [N, K/d, M] (codes from 2^(bits−1) on wrapped to negative), `codebooks`
        float16 [M, 2^bits, 1, d], `scales` float16 [N, 1, 1, 1].

    Raises:
        InvalidInputError: Several sets of codebooks, or in_features not a multiple of the group size; the
            package has neither.
    """
    codes, codebooks, scales = ADDITIVE.unpack(spec, tensors, in_features)
    if codebooks.shape[0] != 1:
        raise InvalidInputError(
            f"The aqlm layout has one set of codebooks per weight, this one has {codebooks.shape[0]}.",
            hint="Convert the weights before they are placed side by side.",
        )
    if in_features % spec.group_size:
        raise InvalidInputError(
            f"The aqlm layout needs in_features ({in_features}) to be a multiple of {spec.group_size}."
        )
    half = spec.codewords >> 1
    wrapped = torch.where(codes >= half, codes - spec.codewords, codes)
    return {
        "codes": wrapped.to(torch.int8 if spec.bits <= 8 else torch.int16),
        "codebooks": codebooks[0].unsqueeze(2).contiguous(),
        "scales": scales[:, None, None, None].contiguous(),
    }


def from_aqlm(
    codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor
) -> tuple[AdditiveSpec, dict[str, torch.Tensor]]:
    """A weight of the aqlm package's layout in ours; see `to_aqlm` for the shapes.

    Raises:
        InvalidInputError: Shapes that do not belong together, codewords over several output rows, or one
            scale per group.
    """
    if codes.dim() != 3 or codebooks.dim() != 4 or codes.shape[2] != codebooks.shape[0]:
        raise InvalidInputError(
            f"aqlm codes {list(codes.shape)} and codebooks {list(codebooks.shape)} do not belong together."
        )
    count, codewords, out_group, group_size = codebooks.shape
    if out_group != 1:
        raise InvalidInputError(f"Codewords over {out_group} output rows are not supported, only over one.")
    if codewords & (codewords - 1) or tuple(scales.shape) != (codes.shape[0], 1, 1, 1):
        raise InvalidInputError(
            f"aqlm codebooks of {codewords} codewords with scales {list(scales.shape)} are not supported.",
            hint="A power of two, and one scale per row, are.",
        )
    spec = AdditiveSpec(count, codewords.bit_length() - 1, group_size)
    unsigned = codes.to(torch.int32) & (codewords - 1)
    return spec, ADDITIVE.pack(spec, unsigned, codebooks[:, :, 0], scales.flatten())


def _pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [N, count] as one row of `codes` each."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    if bits == 16:
        return codes.to(torch.int32).to(torch.int16).contiguous()
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.to(torch.int32).unsqueeze(2) >> shifts) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    places = 1 << torch.arange(8, device=codes.device, dtype=torch.int32)
    return (stream * places).sum(2).to(torch.uint8)


def unpack_codes(codes: torch.Tensor, codebooks: int, bits: int, groups: int) -> torch.Tensor:
    """Stored `codes` as int32 [N, groups, codebooks] in [0, 2^bits)."""
    if bits in (8, 16):
        plain = codes.to(torch.int32) & ((1 << bits) - 1)
        return plain.unflatten(1, (groups, codebooks))
    first = torch.arange(groups * codebooks, device=codes.device) * bits
    # A code of up to 16 bits lies in at most three bytes.
    padded = torch.nn.functional.pad(codes, (0, 2)).to(torch.int32)
    byte = first >> 3
    window = padded[:, byte] | (padded[:, byte + 1] << 8) | (padded[:, byte + 2] << 16)
    plain = (window >> (first & 7).to(torch.int32)) & ((1 << bits) - 1)
    return plain.unflatten(1, (groups, codebooks))


def dequantize_additive(
    codes: torch.Tensor,
    codebooks: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    bits: int,
    in_features: int,
) -> torch.Tensor:
    """The float32 weight [N, in_features] of these tensors: the definition that every kernel must meet."""
    sets, count, codewords, group_size = codebooks.shape
    groups = num_groups(group_size, in_features)
    if codes.is_meta:
        return torch.empty(codes.shape[0], in_features, dtype=torch.float32, device="meta")
    index = unpack_codes(codes, count, bits, groups)
    # One flat table: set p, codebook m, codeword c lie at (p·M + m)·2^bits + c.
    first = torch.arange(count, device=codes.device, dtype=torch.int32) * codewords
    if sets > 1:
        of_row = torch.repeat_interleave(torch.arange(sets, device=codes.device), rows.long())
        index = index + (of_row * count * codewords).to(torch.int32)[:, None, None]
    table = codebooks.reshape(-1, group_size).float()
    summed = torch.zeros(codes.shape[0], groups, group_size, device=codes.device)
    for m in range(count):
        summed += table[(index[:, :, m] + first[m]).long()]
    return (summed * scales.float()[:, None, None]).flatten(1)[:, :in_features].contiguous()


ADDITIVE = AdditiveFormat()
register_format(ADDITIVE)
