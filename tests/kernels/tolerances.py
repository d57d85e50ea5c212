"""How far two correct results may lie apart, per dtype, with the reason; the one place to loosen anything."""

from __future__ import annotations

import torch

# (rtol, atol) between two evaluations that accumulate in fp32 and round to the dtype at the end.
TOLERANCES = {
    # Sums of a few hundred products in another order: about sqrt(n) ulps of the largest term.
    torch.float32: (2e-5, 2e-5),
    # 11 significand bits; inputs of the second product (softmax weights) are rounded once more: 4 ulps.
    torch.float16: (4e-3, 4e-3),
    # 8 significand bits, otherwise as fp16.
    torch.bfloat16: (3e-2, 3e-2),
}


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, scale: float = 1.0, like: torch.dtype | None = None
) -> None:
    """Compare in float64 within the tolerance of `actual`'s dtype, or of the dtype that it is to be `like`.

    Args:
        actual: The result under test.
        expected: The oracle's result, of any dtype.
        scale: Typical magnitude of the result, where it is not about 1; multiplies atol.
        like: Where a kernel rounds on its way to fewer bits than its result has.
    """
    rtol, atol = TOLERANCES[like or actual.dtype]
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=rtol, atol=atol * scale, check_device=False
    )
