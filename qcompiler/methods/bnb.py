"""bnb: what the bitsandbytes package computes, byte for byte (Dettmers et al. 2022 and 2023).

4 bits: blocks of the flattened weight divided by their absmax, each value to the nearest of the 16
of NF4 or FP4; with double quantization absmax minus its mean goes to 8 bits in blocks of 256.
8 bits, LLM.int8(): code = round(127 · w / absmax of the row), w rounded to float16 first as the
package does; activations are quantized at run time by the op.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.int8_channel import INT8_CHANNEL, Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import LUT4, NESTED_BLOCK, QUANT_TYPES, Lut4Spec, dynamic_map, table
from qcompiler.methods.base import Method, MethodOption

# Weights worked on together; a multiple of every block size.
_CHUNK_WEIGHTS = 1 << 22
# What the package divides by where a block is all zeros.
_SMALLEST = 1e-38
# Midpoints between neighbours of a table decide the code; the package orders FP4's two zeros like this.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


class BitsAndBytes(Method):
    """NF4, FP4 and LLM.int8()."""

    name = "bnb"
    summary = "bitsandbytes: NF4 or FP4 blocks at 4 bits, LLM.int8() at 8"
    format_name = LUT4.name  # of 4 bits; 8 bits are int8_channel
    bits = (4, 8)
    options: ClassVar[Mapping[str, MethodOption]] = {
        "quant_type": MethodOption("nf4", QUANT_TYPES, "table of 16 values at 4 bits"),
        "double_quant": MethodOption(True, None, "store the blocks' absmax in 8 bits, at 4 bits"),
        "outlier_threshold": MethodOption(
            6.0, None, "activations from this magnitude on stay in half precision, at 8 bits"
        ),
    }

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Lut4Spec | Int8ChannelSpec:
        """See `Method.resolve_spec`; `group_size` is the block size at 4 bits."""
        self.check_bits(bits)
        resolved = self.validate(options)
        if bits == 8:
            if group_size:
                raise InvalidInputError(
                    f"LLM.int8() has one scale per output channel, not groups of {group_size}",
                    hint="Leave the group size out at 8 bits.",
                )
            return Int8ChannelSpec(outlier_threshold=resolved["outlier_threshold"])
        size = self.default_group_size if group_size is None else group_size
        return Lut4Spec(resolved["quant_type"], size, resolved["double_quant"])

    def quantize(
        self,
        weight: Tensor,
        spec: Lut4Spec | Int8ChannelSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
    ) -> dict[str, Tensor]:
        """See `Method.quantize`; the numbers follow from `spec` alone."""
        self.validate(options)
        check_matrix(weight, name)
        if isinstance(spec, Lut4Spec):
            return quantize_lut4(weight, spec)
        codes, absmax = quantize_rows_absmax(weight)
        return INT8_CHANNEL.pack(spec, codes, absmax / 127.0)


def check_matrix(weight: Tensor, name: str) -> None:
    """Refuse what is not a finite float matrix.

    Raises:
        InvalidInputError: Names the tensor and what is wrong with it.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise InvalidInputError(
            f"{name}: a floating-point matrix was expected, not {weight.dtype} {list(weight.shape)}"
        )
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        raise InvalidInputError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite",
            hint="The checkpoint is damaged or overflowed in its dtype; this tensor cannot be quantized.",
        )


def quantize_lut4(weight: Tensor, spec: Lut4Spec) -> dict[str, Tensor]:
    """The lut4 tensors of a weight [out_features, in_features].

    Codes, absmax and nested statistics equal bitsandbytes' `quantize_4bit`; the 8-bit codes of absmax
    are the nearest ones, as on its GPUs (its CPU library looks them up on a grid of 2^16 points).
    """
    LUT4.tensor_specs(spec, *weight.shape)  # refuses shapes before any work
    values = table(spec.quant_type).to(weight.device)
    order = torch.arange(16) if spec.quant_type == "nf4" else torch.tensor(_FP4_ORDER)
    order = order.to(weight.device)
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    flat = weight.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=weight.device)
    statistics = []
    for start in range(0, flat.numel(), _CHUNK_WEIGHTS):
        chunk = flat[start : start + _CHUNK_WEIGHTS].float()
        absmax, scaled = _normalise(chunk, spec.block_size)
        codes[start : start + chunk.numel()] = order[torch.bucketize(scaled, midpoints)].to(torch.uint8)
        statistics.append(absmax)
    absmax = torch.cat(statistics)
    codes = codes.reshape(weight.shape)
    if not spec.double_quant:
        return LUT4.pack(spec, codes, absmax)
    offset = absmax.mean()
    nested_absmax, scaled = _normalise(absmax - offset, NESTED_BLOCK)
    steps = dynamic_map().to(weight.device)
    nested = torch.bucketize(scaled, (steps[:-1] + steps[1:]) / 2).to(torch.uint8)
    # Where all absmax of a block equal the mean there is nothing to scale; the package writes zeros.
    flat_blocks = nested_absmax <= _SMALLEST
    nested_absmax = nested_absmax.masked_fill(flat_blocks, 0.0)
    nested = nested.masked_fill(flat_blocks.repeat_interleave(NESTED_BLOCK)[: nested.numel()], 0)
    return LUT4.pack(spec, codes, nested, nested_absmax, offset.reshape(1))


def _normalise(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The absmax of each block, and the values divided by it, in [-1, 1]; the last block may be short."""
    whole = values.numel() // block_size * block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1).flatten()
    if whole < values.numel():
        rest = values[whole:]
        largest = rest.abs().max().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, (rest / largest).clamp(-1, 1)])
    return absmax, scaled


def quantize_rows_absmax(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and absmax float32 [N] of bitsandbytes' `int8_vectorwise_quant`.

    The package takes float16; a weight beyond its range is quantized from float32 instead.
    """
    half = weight.to(torch.float16)
    values = (half if bool(half.isfinite().all()) else weight).float()
    absmax = values.abs().amax(dim=1)
    codes = torch.round(values * (127.0 / absmax.clamp(min=1e-30))[:, None])
    return codes.to(torch.int8), absmax
