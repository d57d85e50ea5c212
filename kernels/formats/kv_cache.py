"""Formats of a quantized KV cache: one scale per token and head, codes packed into 16-bit words.

    int8   x ≈ scale · code          code in [−127, 127], scale float32 = max|x| / 127
    fp8    x ≈ scale · e4m3(code)    scale float32 = max|x| / 448 (OCP FP8 E4M3, saturating)
    int4   x ≈ low + scale · code    code in [0, 15], scale = (max − min) / 15 and low = min, both float16

A head's D channels become W words; bits [j·bits, (j+1)·bits) of word e hold
channel j·W + e. So a plane j of all words is a run of neighbouring channels,
and a kernel multiplies plane by plane instead of interleaving. W is padded to
8 words: every row begins at a multiple of 16 bytes. Rounding is ⌊x + ½⌋.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.kernels.errors import InvalidInputError

_ALIGNED_WORDS = 8
_FP8_MAX = 448.0
# Smallest scales: of a row of zeros, whose codes are zero; float16's smallest number is 2^-24.
_MIN_SCALE = {"int8": 2.0**-40, "fp8": 2.0**-40, "int4": 2.0**-24}


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    Args:
        name: "int8", "int4" or "fp8".
        bits: Bits per code.
    """

    name: str
    bits: int

    @property
    def planes(self) -> int:
        """Codes per word."""
        return 16 // self.bits

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales: 4 bytes per token and head in every format."""
        return torch.float16 if self.name == "int4" else torch.float32

    def words(self, dim: int) -> int:
        """Words of a head with `dim` channels."""
        words = -(-dim // self.planes)
        return -(-words // _ALIGNED_WORDS) * _ALIGNED_WORDS

    def scale_row(self, heads: int) -> tuple[int, ...]:
        """Shape of the scales of one token: (heads,), with (scale, low) last for int4."""
        return (heads, 2) if self.name == "int4" else (heads,)

    def bits_per_value(self, dim: int) -> float:
        """Stored bits per channel of a head, scales and padding included."""
        return (16 * self.words(dim) + 32) / dim

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales.

        Args:
            x: Keys or values [..., heads, D], any float dtype.

        Returns:
            words int16 [..., heads, W], scales [..., *scale_row(heads)].
        """
        dim = x.shape[-1]
        x = x.float()
        least = _MIN_SCALE[self.name]
        if self.name == "int4":
            low, high = (x.amin(-1), x.amax(-1)) if dim else (x.sum(-1), x.sum(-1))
            low = low.half()
            scale = _divided(high - low.float(), 15.0).half().clamp_min(least)
            scales = torch.stack([scale, low], dim=-1)
            scaled = (x - low.float().unsqueeze(-1)) * (1.0 / scale.float()).unsqueeze(-1)
            codes = torch.floor(scaled + 0.5).clamp(0, 15).nan_to_num(0.0).int()
        else:
            top = 127.0 if self.name == "int8" else _FP8_MAX
            scales = _divided(x.abs().amax(-1), top).clamp_min(least)
            scaled = x * (1.0 / scales).unsqueeze(-1)
            if self.name == "int8":
                codes = torch.floor(scaled + 0.5).clamp(-127, 127).nan_to_num(0.0).int()
            else:
                codes = scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8).int()
        return self._pack(codes), scales

    def dequantize(self, words: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
        """The values that codes stand for.

        Args:
            words: int16 [..., heads, W].
            scales: As `quantize` gives them.
            dim: Channels per head.

        Returns:
            float32 [..., heads, dim].
        """
        parts = [(words.int() >> (self.bits * j)) & ((1 << self.bits) - 1) for j in range(self.planes)]
        codes = torch.cat(parts, dim=-1)[..., :dim]
        if self.name == "int4":
            return codes.float() * scales[..., 0, None].float() + scales[..., 1, None].float()
        if self.name == "int8":
            values = codes.to(torch.uint8).view(torch.int8).float()
        else:
            values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        return values * scales.unsqueeze(-1)

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int32 codes [..., D] → int16 words [..., W]."""
        dim = codes.shape[-1]
        words = self.words(dim)
        padded = torch.nn.functional.pad(codes & ((1 << self.bits) - 1), (0, words * self.planes - dim))
        packed = torch.zeros_like(padded[..., :words])
        for j, part in enumerate(padded.split(words, dim=-1)):
            packed |= part << (self.bits * j)
        # int32 in [0, 65536) to the int16 of the same bits
        return ((packed ^ 0x8000) - 0x8000).to(torch.int16)


def _divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """The quotient, rounded once on every device: for a Python number CUDA multiplies by its reciprocal."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


KV_FORMATS = {f.name: f for f in (KVFormat("int8", 8), KVFormat("int4", 4), KVFormat("fp8", 8))}


def smallest_scale(name: str) -> float:
    """Scales of a format are no smaller than this."""
    return _MIN_SCALE[name]


def kv_format(name: str) -> KVFormat:
    """The format of that name.

    Raises:
        InvalidInputError: there is none.
    """
    found = KV_FORMATS.get(name)
    if found is None:
        raise InvalidInputError(
            f"{name!r} is not a format of the KV cache", hint=f"Choose from {', '.join(KV_FORMATS)}."
        )
    return found


def check_pages(
    format_: KVFormat, pages: torch.Tensor, scales: torch.Tensor, heads: int, dim: int, name: str
) -> None:
    """Hold the pages and scales of keys or values against their format.

    Args:
        format_: The format.
        pages: Words [pages, page_size, heads, W].
        scales: [pages, page_size, *scale_row(heads)].
        heads: Key heads of the step's keys or values.
        dim: Their channels.
        name: "k" or "v", for the message.

    Raises:
        InvalidInputError: dtype or shape is another.
    """
    words = (heads, format_.words(dim))
    if pages.dtype != torch.int16 or pages.dim() != 4 or tuple(pages.shape[2:]) != words:
        raise InvalidInputError(
            f"{name}_pages are {pages.dtype} {list(pages.shape)}, but {format_.name} needs int16 "
            f"[pages, page_size, {words[0]}, {words[1]}] for heads of {dim} channels"
        )
    wanted = (*pages.shape[:2], *format_.scale_row(heads))
    if scales.dtype != format_.scale_dtype or tuple(scales.shape) != wanted:
        raise InvalidInputError(
            f"{name}_scales are {scales.dtype} {list(scales.shape)}, but {format_.name} needs "
            f"{format_.scale_dtype} {list(wanted)} beside these pages"
        )
