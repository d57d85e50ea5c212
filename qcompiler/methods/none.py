"""No quantization: the same road and the same runtime with float weights, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor


class Unquantized(Method):
    """Leaves every weight in the activation dtype."""

    name = "none"
    summary = "float weights, as a baseline"
    format_name = "none"
    bits = (16,)
    quantizes = False

    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """There is nothing to set.

        Raises:
            InvalidInputError: A width or a group size was asked for.
        """
        self.check_bits(bits)
        if group_size is not None:
            raise InvalidInputError("method 'none' has no groups", hint="Drop --group-size.")

    def quantize(
        self, weight: Tensor, spec: Any, options: Mapping[str, Any] | None = None, *, name: str = "weight"
    ) -> dict[str, Tensor]:
        """Refused: no weight is given to a method that does not quantize.

        Raises:
            InvalidInputError: Always.
        """
        raise InvalidInputError(f"{name}: method 'none' does not quantize")
