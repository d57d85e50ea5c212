"""Base of the methods that store weights in the affine format: w = (code - zero) · scale per group.

Takes care of what they share: input checks, rows in chunks of bounded memory, a last group that
is short, groups of one value, and scales that the stored dtype can hold. A subclass solves one
thing: codes, scales and zeros of equal groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, BITS, AffineSpec
from qcompiler.methods import fused_affine
from qcompiler.methods.base import Method, MethodOption
from qcompiler.methods.integer_zeros import OPTION as ZEROS
from qcompiler.methods.integer_zeros import integer_groups

# Weights worked on together: a few MB of fp32 temporaries, past which calls cost nothing; more fill a GPU.
CHUNK_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 24}


class Groups(NamedTuple):
    """Quantized groups: `codes` fp32 [groups, size], `scales` and `zeros` fp32 [groups, 1]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class Solution(NamedTuple):
    """A quantized weight: `codes` uint8 [N, K], `scales` and `zeros` fp32 [N, groups of a row]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class AffineMethod(Method):
    """A method on affine groups; subclasses give `solve_groups`."""

    format_name: ClassVar[str] = AFFINE.name
    bits: ClassVar[tuple[int, ...]] = BITS
    options: ClassVar[Mapping[str, MethodOption]] = {"zeros": ZEROS}

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> AffineSpec:
        """See `Method.resolve_spec`; scales and zeros are fp16."""
        self.check_bits(bits)
        return AffineSpec(bits, self.default_group_size if group_size is None else group_size)

    def quantize(
        self,
        weight: Tensor,
        spec: AffineSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
    ) -> dict[str, Tensor]:
        """See `Method.quantize`; on a GPU with Triton by one kernel where the method has one."""
        resolved = self.validate(options)
        # Integer zero points are searched in torch.
        if resolved.get("zeros") != "integer" and fused_affine.available(weight, spec):
            tensors = self.fused(weight, spec, resolved, name)
            if tensors is not None:
                return tensors
        solution = self.solve(weight, spec, options, name=name)
        return AFFINE.pack(spec, solution.codes, solution.scales, solution.zeros)

    def fused(
        self, weight: Tensor, spec: AffineSpec, options: Mapping[str, Any], name: str
    ) -> dict[str, Tensor] | None:
        """What `quantize` gives, and raises, by a kernel; None if the method has none for these options."""
        return None

    def solve(
        self,
        weight: Tensor,
        spec: AffineSpec,
        options: Mapping[str, Any] | None = None,
        *,
        name: str = "weight",
        chunk_weights: int | None = None,
    ) -> Solution:
        """Codes, scales and zeros of a weight, scales and zeros already rounded to what is stored.

        Args:
            weight: [out_features, in_features], floating point.
            spec: Bits, group size and scale dtype.
            options: The method's options.
            name: The tensor's name, for error messages.
            chunk_weights: Weights worked on together, at least one row's; no influence on a CPU's result.

        Raises:
            InvalidInputError: Wrong options; not a float matrix; a weight that is NaN or infinite; weights
                too large or too small for the scale dtype.
        """
        resolved = self.validate(options)
        check_weight(weight, spec, name)
        size = spec.group_size or weight.shape[1]
        whole = weight.shape[1] // size * size
        parts = [self._solve_equal(weight[:, :whole], size, spec, resolved, chunk_weights)] if whole else []
        if whole < weight.shape[1]:
            rest = weight[:, whole:]
            parts.append(self._solve_equal(rest, rest.shape[1], spec, resolved, chunk_weights))
        return Solution(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))

    def _solve_equal(
        self,
        weight: Tensor,
        size: int,
        spec: AffineSpec,
        options: Mapping[str, Any],
        chunk_weights: int | None,
    ) -> Solution:
        rows, columns = weight.shape
        if chunk_weights is None:
            chunk_weights = CHUNK_WEIGHTS.get(weight.device.type, 1 << 20)
        statistics = self.statistics(weight, options)
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        scales = torch.empty((rows, columns // size), dtype=torch.float32, device=weight.device)
        zeros = torch.empty_like(scales)
        step = max(1, chunk_weights // columns)
        for start in range(0, rows, step):
            part = weight[start : start + step].float()
            importance = self.importance(part, statistics)
            if importance is not None:
                importance = importance.reshape(-1, size)
            groups = part.reshape(-1, size)
            if options.get("zeros") == "integer":
                found = Groups(*integer_groups(groups, spec, importance, self.clips(spec)))
            else:
                found = constant_groups_exact(groups, self.solve_groups(groups, spec, importance), spec)
            codes[start : start + step] = found.codes.reshape(part.shape).to(torch.uint8)
            scales[start : start + step] = found.scales.reshape(part.shape[0], -1)
            zeros[start : start + step] = found.zeros.reshape(part.shape[0], -1)
        return Solution(codes, scales, zeros)

    def statistics(self, weight: Tensor, options: Mapping[str, Any]) -> Any:
        """What `importance` needs to know of the whole weight [out_features, columns]; computed once."""
        return None

    def importance(self, rows: Tensor, statistics: Any) -> Tensor | None:
        """Weight of each element's squared error, positive fp32 of the shape of `rows`; None: all alike."""
        return None

    def clips(self, spec: AffineSpec) -> Sequence[float]:
        """Where the search for integer zero points starts; see `integer_groups`."""
        return ()

    @abstractmethod
    def solve_groups(self, values: Tensor, spec: AffineSpec, importance: Tensor | None) -> Groups:
        """Quantize groups, each on its own.

        Args:
            values: fp32 [groups, size], finite.
            spec: Bits and scale dtype.
            importance: fp32 [groups, size] or None, see `importance`.

        Returns:
            Codes as integers in fp32; scales (positive) and zeros as the format stores them.
        """


def check_weight(weight: Tensor, spec: AffineSpec, name: str) -> None:
    """Refuse what cannot be quantized faithfully.

    Raises:
        InvalidInputError: Not a float matrix; NaN or infinite; too large or too small for `spec.scale_dtype`.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise InvalidInputError(
            f"{name}: a floating-point matrix was expected, not {weight.dtype} {list(weight.shape)}"
        )
    low, high = (float(bound) for bound in weight.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):  # aminmax passes NaN on
        bad = int(weight.isfinite().logical_not().sum())
        raise InvalidInputError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite",
            hint="The checkpoint is damaged or overflowed in its dtype; this tensor cannot be quantized.",
        )
    check_range(low, high, spec, name)


def check_range(low: float, high: float, spec: AffineSpec, name: str) -> None:
    """Refuse a weight between `low` and `high`, both finite, that the scale dtype cannot serve.

    Raises:
        InvalidInputError: Too large or too small for `spec.scale_dtype`.
    """
    codes = 2**spec.bits - 1
    info = torch.finfo(spec.scale_dtype)
    largest = max(abs(low), abs(high))
    if high - low > min(codes * info.max, torch.finfo(torch.float32).max) or largest > info.max:
        raise InvalidInputError(
            f"{name}: a weight of {largest:.3g} is beyond the range of {spec.scale_dtype} scales",
            hint="Skip this tensor, or store its scales as float32.",
        )
    # Below this, rounding a scale to the dtype's smallest step moves the end codes by half a step.
    if 0 < largest < info.smallest_normal * info.eps / 2 * codes**2:
        raise InvalidInputError(
            f"{name}: its largest weight of {largest:.3g} is too small for {spec.scale_dtype} scales",
            hint="Skip this tensor, or store its scales as float32.",
        )


def store(scales: Tensor, offsets: Tensor, largest: Tensor, spec: AffineSpec) -> tuple[Tensor, Tensor]:
    """Scales and zeros as they are stored, for lines w = offset + scale · code.

    A group far from zero and narrow would need a zero point that its dtype cannot resolve; its scale is
    held at 1/1024 of its largest weight, where neither fp16 zeros nor the result lose more than the
    rounding of the weights to bfloat16 would.

    Args:
        scales: Step between codes, fp32.
        offsets: Weight that code 0 stands for, fp32.
        largest: Largest magnitude in each group, fp32.
        spec: Scale dtype.

    Returns:
        Positive finite scales and finite zeros, representable in the stored dtypes, as fp32.
    """
    info = torch.finfo(spec.scale_dtype)
    smallest = info.smallest_normal if spec.scale_dtype != torch.float16 else info.smallest_normal * info.eps
    scales = torch.maximum(scales, largest / 1024).clamp(smallest, info.max).to(spec.scale_dtype).float()
    limit = torch.finfo(spec.zero_dtype).max
    zeros = (-offsets / scales).clamp(-limit, limit).to(spec.zero_dtype).float()
    return scales, zeros + 0.0  # no negative zero


def constant_groups_exact(values: Tensor, found: Groups, spec: AffineSpec) -> Groups:
    """Groups of one value c as code 0 with scale 2^k, zero -c/2^k: c keeps all bits that a zero point has."""
    low, high = values.aminmax(dim=1, keepdim=True)
    constant = low == high
    if not bool(constant.any()):
        return found
    _, exponent = torch.frexp(low)
    power = torch.ldexp(torch.ones_like(low), (exponent - 1).clamp(-14, 15))
    scales, zeros = store(power, low, torch.zeros_like(low), spec)
    return Groups(
        torch.where(constant, 0.0, found.codes),
        torch.where(constant, scales, found.scales),
        torch.where(constant, zeros, found.zeros),
    )
