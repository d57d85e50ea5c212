"""Which implementation runs an op on a device, and what its tensors must be turned into once, at load.

The canonical op runs everywhere without any of this; a provider is chosen
where another op on repacked tensors is faster. Providers are tried in the
order of `_PROVIDERS`; the first that supports the case is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

import qcompiler.kernels.ops  # noqa: F401  (registers the canonical ops)
from qcompiler.kernels.cpu import linear_affine as cpu
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec, block_width
from qcompiler.kernels.formats.body_tail import BODY_TAIL, BodyTailSpec
from qcompiler.kernels.formats.int8_channel import INT8_CHANNEL, Int8ChannelSpec
from qcompiler.kernels.formats.lut4 import LUT4, Lut4Spec
from qcompiler.kernels.library import registered_ops
from qcompiler.kernels.ops.linear_additive_slices import LINEAR_ADDITIVE_SLICES, pack_slices
from qcompiler.kernels.ops.linear_affine_gated import gated_op
from qcompiler.kernels.ops.linear_affine_sides import LINEAR_AFFINE_SIDES, pack_sides

Tensors = dict[str, torch.Tensor]
Attributes = dict[str, Any]

_INT4_GROUPS = (256, 128, 64, 32)


class Provider(ABC):
    """One way to run an op; made by `select_provider` for a device and an activation dtype.

    Args:
        device: Where the op runs.
        dtype: Of the activations.
        lean: Keep no dense copy beside packed codes, at the price of slow long prompts.
    """

    name: str
    op_name: str

    def __init__(self, device: torch.device, dtype: torch.dtype, lean: bool = False):
        self.device = device
        self.dtype = dtype
        self.lean = lean

    @property
    @abstractmethod
    def op(self) -> torch._ops.OpOverload:
        """The op to call: the activation first, all else by the names in its schema (see `bind`)."""

    @abstractmethod
    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """None when this provider can run the case, else the reason why not."""

    @abstractmethod
    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """The op's own tensors and attributes, made once from the canonical ones."""

    def bind(self, x: Any, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Positional arguments of `op`; optional tensors that are absent become None."""
        names = [argument.name for argument in self.op._schema.arguments]
        return (x, *(attrs[name] if name in attrs else tensors.get(name) for name in names[1:]))


class Canonical(Provider):
    """The op as it stands in graphs: Triton on a CUDA device where the op has it, else its reference."""

    name = "canonical"

    def __init__(self, op_name: str, device: torch.device, dtype: torch.dtype, lean: bool = False):
        super().__init__(device, dtype, lean)
        self.op_name = op_name

    @property
    def op(self) -> torch._ops.OpOverload:
        """The canonical op."""
        return registered_ops()[self.op_name].overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Everything."""
        return None

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Nothing changes."""
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}, dict(attrs)


class _AffineCpu(Provider):
    op_name = "linear_affine"

    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        spec = AffineSpec(attrs["bits"], attrs["group_size"], tensors["scales"].dtype)
        return AFFINE.dequantize(spec, _stored(tensors), attrs["in_features"], self.dtype)

    def _start(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> Tensors:
        """The tensors that every CPU op keeps: the bias, and the dense weight unless lean."""
        kept = {} if self.lean else {"dense": self._dense(tensors, attrs)}
        if tensors.get("bias") is not None:
            kept["bias"] = tensors["bias"]
        return kept


class AffineCpuInt4(_AffineCpu):
    """torch's int4 matmul; its scales and zeros are bfloat16."""

    name = "cpu-int4"

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::linear_affine_cpu_int4`."""
        return cpu.LINEAR_AFFINE_CPU_INT4.overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Up to 4 bits, bfloat16, groups and sizes as torch's kernel wants them."""
        if self.device.type != "cpu":
            return "runs on CPUs"
        if self.dtype != torch.bfloat16:
            return f"is fast for bfloat16 only, not {self.dtype}"
        if attrs["bits"] > 4:
            return f"holds codes of 4 bits, not {attrs['bits']}"
        if tensors["low"].shape[0] % 16:
            return f"needs out_features in sixteens, not {tensors['low'].shape[0]}"
        if _int4_group(attrs) is None:
            return f"has no group size {attrs['group_size']} for in_features {attrs['in_features']}"
        return None

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Repack the codes; a per-channel scale is repeated for each group of torch's kernel."""
        spec = AffineSpec(attrs["bits"], attrs["group_size"], tensors["scales"].dtype)
        codes, scales, zeros = AFFINE.unpack(spec, _stored(tensors), attrs["in_features"])
        group = _int4_group(attrs)
        if group is None:
            raise InvalidInputError(f"{self.name} {self.supports(attrs, tensors)}.")
        if not spec.group_size:
            scales, zeros = (side.expand(-1, attrs["in_features"] // group) for side in (scales, zeros))
        # Codes of fewer bits move to the middle of the 16: the bfloat16 offset (8 − zero)·scale stays small.
        shift = 8 - (1 << (spec.bits - 1))
        kept = self._start(tensors, attrs)
        kept["packed"], kept["scales_and_zeros"] = cpu.pack_int4(codes + shift, scales, zeros.float() + shift)
        return kept, {"group_size": group}


class AffineCpuInt8(_AffineCpu):
    """torch's int8 matmul, for one group per output channel; its scales are bfloat16."""

    name = "cpu-int8"

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::linear_affine_cpu_int8`."""
        return cpu.LINEAR_AFFINE_CPU_INT8.overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Per-channel codes of any width, bfloat16."""
        if self.device.type != "cpu":
            return "runs on CPUs"
        if self.dtype != torch.bfloat16:
            return f"is fast for bfloat16 only, not {self.dtype}"
        if tensors["scales"].shape[0] != 1:
            return "needs one group per output channel"
        if attrs["in_features"] % 32:
            # torch's kernel reads whole vectors and runs past the end of a row (seen: NaN, crashes).
            return f"needs in_features in thirty-twos, not {attrs['in_features']}"
        return None

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Codes minus 128 as int8; the offset keeps the weight unchanged: (128 − zero)·scale.

        The offset uses the scale as rounded, so that zero itself stays exact.
        """
        spec = AffineSpec(attrs["bits"], attrs["group_size"], tensors["scales"].dtype)
        codes, scales, zeros = AFFINE.unpack(spec, _stored(tensors), attrs["in_features"])
        centre = 1 << (spec.bits - 1)
        kept = self._start(tensors, attrs)
        kept["codes"] = (codes.to(torch.int16) - centre).to(torch.int8)
        kept["scales"] = scales[:, 0].to(torch.bfloat16).contiguous()
        kept["offsets"] = (centre - zeros[:, 0].float()) * kept["scales"].float()
        return kept, {}


class AffineCpuDense(_AffineCpu):
    """The weight dequantized once into the activations' dtype, and a plain linear."""

    name = "cpu-dense"

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::linear_affine_cpu_dense`."""
        return cpu.LINEAR_AFFINE_CPU_DENSE.overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Every affine weight, on CPUs."""
        return None if self.device.type == "cpu" else "runs on CPUs"

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Dequantize."""
        kept = {"dense": self._dense(tensors, attrs)}
        if tensors.get("bias") is not None:
            kept["bias"] = tensors["bias"]
        return kept, {}


class BodyTailCpuDense(AffineCpuDense):
    """Body and tail made one dense weight once, and a plain linear."""

    op_name = "linear_body_tail"

    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        bits, group_size = attrs["bits"], attrs["group_size"]
        fraction, tail_bits = attrs["tail_fraction"], attrs["tail_bits"]
        spec = BodyTailSpec(bits, group_size, fraction, tail_bits, tensors["scales"].dtype)
        stored = _stored(tensors) | {part: tensors[part] for part in ("tail", "tail_scales")}
        return BODY_TAIL.dequantize(spec, stored, attrs["in_features"], self.dtype)


class _GroupedCpuDense(Provider):
    """Expert weights dequantized once into the activations' dtype, and a plain grouped linear."""

    name = "cpu-dense"

    @abstractmethod
    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        """The weight [experts·out_features, in_features]."""

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::grouped_linear`."""
        return registered_ops()["grouped_linear"].overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Every weight of the format, on CPUs, unless memory is to be saved."""
        if self.device.type != "cpu":
            return "runs on CPUs"
        experts = _experts(attrs)
        if not experts or next(iter(tensors.values())).shape[0] % experts:
            return "must know how many experts the stored rows are divided among"
        return "keeps dense weights" if self.lean else None

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Dequantize; offsets that are no tensor yet need `attrs["experts"]` beside them."""
        dense = self._dense(tensors, attrs)
        kept = {"weight": dense.view(_experts(attrs), -1, dense.shape[1])}
        if tensors.get("bias") is not None:
            kept["bias"] = tensors["bias"]
        return kept, {"offsets": attrs["offsets"], "transposed": False}


class GroupedAffineCpuDense(_GroupedCpuDense):
    """Experts in the affine format."""

    op_name = "grouped_linear_affine"

    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        spec = AffineSpec(attrs["bits"], attrs["group_size"], tensors["scales"].dtype)
        return AFFINE.dequantize(spec, _stored(tensors), attrs["in_features"], self.dtype)


class GroupedLut4CpuDense(_GroupedCpuDense):
    """Experts in the lut4 format."""

    op_name = "grouped_linear_lut4"

    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        double = tensors.get("nested_offset") is not None
        spec = Lut4Spec(attrs["quant_type"], attrs["block_size"], double)
        return LUT4.dequantize(spec, tensors, attrs["in_features"], self.dtype)


class GroupedInt8CpuDense(_GroupedCpuDense):
    """Experts in the int8_channel format."""

    op_name = "grouped_linear_int8"

    def _dense(self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> torch.Tensor:
        spec = Int8ChannelSpec(None, tensors["scales"].dtype)
        return INT8_CHANNEL.dequantize(spec, tensors, tensors["codes"].shape[1], self.dtype)


class AffineSides(Provider):
    """The Triton kernels, scales and zeros prepared as pairs in the activations' dtype."""

    name = "sides"
    op_name = "linear_affine"

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::linear_affine_sides`."""
        return LINEAR_AFFINE_SIDES.overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """16-bit activations on a GPU, blocks of codes as wide as a dot."""
        if self.device.type != "cuda":
            return "runs on GPUs"
        if self.dtype not in (torch.float16, torch.bfloat16):
            return f"would round {self.dtype}"
        width = block_width(attrs["bits"], attrs["group_size"], attrs["in_features"])
        return None if width >= 16 else f"needs blocks 16 codes wide, not {width}"

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Codes stay as they are."""
        kept = {name: tensors[name] for name in ("low", "high", "bias") if tensors.get(name) is not None}
        shape = (attrs["bits"], attrs["group_size"], attrs["in_features"])
        kept["sides"] = pack_sides(tensors["scales"], tensors["zeros"], *shape, self.dtype)
        return kept, dict(attrs)


class AdditiveSlices(Provider):
    """The Triton kernels, a 16-bit codebook rounded to int8 (see `ops/linear_additive_slices.py`)."""

    name = "slices"
    op_name = "linear_additive"

    @property
    def op(self) -> torch._ops.OpOverload:
        """`qcompiler::linear_additive_slices`."""
        return LINEAR_ADDITIVE_SLICES.overload

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """One codebook of 65536 codewords of 8 values, 16-bit activations, a GPU that holds a slice."""
        if self.device.type != "cuda":
            return "runs on GPUs"
        if self.dtype not in (torch.float16, torch.bfloat16):
            return f"would round {self.dtype}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(self.device) < (9, 0):
            return "needs the shared memory of a Hopper GPU"
        if tuple(tensors["codebooks"].shape) != (1, 1, 65536, 8):
            return f"holds one codebook of 65536 by 8, not {list(tensors['codebooks'].shape)}"
        return None

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """Codes stay as they are, the codebook is replaced by its rounded self."""
        kept = {part: tensors[part] for part in ("codes", "scales", "rows")}
        if tensors.get("bias") is not None:
            kept["bias"] = tensors["bias"]
        return kept | pack_slices(tensors["codebooks"]), dict(attrs)


class _Gated(Provider):
    """`linear_affine_gated` as a provider of `linear_affine` runs it."""

    op_name = "linear_affine_gated"
    plain: type[Provider]

    def __init__(self, device: torch.device, dtype: torch.dtype, lean: bool = False):
        super().__init__(device, dtype, lean)
        self._linear = self.plain(device, dtype, lean)

    @property
    def op(self) -> torch._ops.OpOverload:
        """The gated form of the other provider's op."""
        return gated_op(self._linear.op)

    def supports(self, attrs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
        """What the other provider does."""
        return self._linear.supports(attrs, tensors)

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]
    ) -> tuple[Tensors, Attributes]:
        """As the other provider does, the activation besides."""
        kept, settings = self._linear.prepare(tensors, attrs)
        return kept, {**settings, "activation": attrs["activation"]}


class GatedSides(_Gated):
    """See `AffineSides`."""

    name, plain = AffineSides.name, AffineSides


class GatedCpuInt4(_Gated):
    """See `AffineCpuInt4`."""

    name, plain = AffineCpuInt4.name, AffineCpuInt4


class GatedCpuInt8(_Gated):
    """See `AffineCpuInt8`."""

    name, plain = AffineCpuInt8.name, AffineCpuInt8


class GatedCpuDense(_Gated):
    """See `AffineCpuDense`."""

    name, plain = AffineCpuDense.name, AffineCpuDense


_PROVIDERS: tuple[type[Provider], ...] = (
    AffineSides,
    GatedSides,
    GatedCpuInt4,
    GatedCpuInt8,
    GatedCpuDense,
    AdditiveSlices,
    AffineCpuInt4,
    AffineCpuInt8,
    AffineCpuDense,
    BodyTailCpuDense,
    GroupedAffineCpuDense,
    GroupedLut4CpuDense,
    GroupedInt8CpuDense,
)


def select_provider(
    op_name: str,
    attrs: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    lean: bool = False,
) -> Provider:
    """The provider to use for an op with these weights.

    Args:
        op_name: Canonical op without its namespace, e.g. "linear_affine".
        attrs: Its non-tensor arguments, e.g. bits, group_size, in_features.
        tensors: Its weights by argument name (low, high, scales, zeros, bias); may be meta tensors.
        device: Where it will run.
        dtype: Of the activations.
        lean: Prefer little memory over speed on long prompts (no dense copy beside packed codes).

    Returns:
        A provider; call `prepare` once and then `provider.op(*provider.bind(x, tensors, attrs))`.

    Raises:
        InvalidInputError: No such op.
    """
    if op_name not in registered_ops():
        raise InvalidInputError(f"There is no op qcompiler::{op_name}.")
    device = torch.device(device)
    for kind in _PROVIDERS:
        provider = kind(device, dtype, lean)
        if provider.op_name == op_name and provider.supports(attrs, tensors) is None:
            return provider
    return Canonical(op_name, device, dtype, lean)


def _experts(attrs: Mapping[str, Any]) -> int:
    offsets = attrs["offsets"]
    return int(attrs.get("experts") or (offsets.shape[0] if isinstance(offsets, torch.Tensor) else 0))


def _int4_group(attrs: Mapping[str, Any]) -> int | None:
    size, in_features = attrs["group_size"], attrs["in_features"]
    fitting = [group for group in _INT4_GROUPS if in_features % group == 0 and size in (0, group)]
    return fitting[0] if fitting else None


def _stored(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    names = ("low", "high", "scales", "zeros")
    return {name: tensors[name] for name in names if tensors.get(name) is not None}
