"""eetq: symmetric int8 per output channel, weight-only, as NetEase-FuXi/EETQ computes it.

scale = max |w| / 128 of the channel, code = clip(round(w / scale), -128, 127), halves away from
zero. The scale that divides is float32; EETQ then stores it in the activations' dtype, here it
stays float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.int8_channel import INT8_CHANNEL, Int8ChannelSpec
from qcompiler.methods.base import Method
from qcompiler.methods.bnb import check_matrix


class Eetq(Method):
    """Per-channel symmetric int8 with the scale absmax/128."""

    name = "eetq"
    summary = "EETQ: weight-only int8, one scale per output channel"
    format_name = INT8_CHANNEL.name
    bits = (8,)
    default_group_size = 0

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Int8ChannelSpec:
        """See `Method.resolve_spec`; there are no groups, so `group_size` is None or 0."""
        self.check_bits(bits)
        self.validate(options)
        if group_size:
            raise InvalidInputError(
                f"method 'eetq' has one scale per output channel, not groups of {group_size}",
                hint="Leave the group size out, or choose method rtn for 8-bit groups.",
            )
        return Int8ChannelSpec()

    def quantize(
        self,
        weight: Tensor,
        spec: Int8ChannelSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
    ) -> dict[str, Tensor]:
        """See `Method.quantize`."""
        self.validate(options)
        check_matrix(weight, name)
        values = weight.float()
        scales = values.abs().amax(dim=1) / 128.0
        ratios = values / scales.clamp(min=torch.finfo(torch.float32).smallest_normal)[:, None]
        # torch.round takes halves to even, C's round away from zero.
        codes = (ratios.sign() * (ratios.abs() + 0.5).floor()).clamp_(-128, 127)
        return INT8_CHANNEL.pack(spec, codes.to(torch.int8), scales)
