"""`qcompiler::linear_ternary`: y = x · (codes · scales)ᵀ + bias, four codes to a byte."""

import torch

from qcompiler.kernels.library import register_op


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Codes int8 [N, K] in {-1, 0, 1} from bytes [N, ⌈K/4⌉]; the first code is the lowest pair of bits."""
    pairs = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    return pairs[:, :in_features].to(torch.int8) - 1


def reference(x, packed, scales, bias, in_features):
    """The op's semantics in plain torch: float32 sums, rounded once."""
    y = torch.nn.functional.linear(x.float(), unpack(packed, in_features).float()) * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def fake(x, packed, scales, bias, in_features):
    """Shape and dtype of the result."""
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


# A Triton kernel is named here too: cuda="qcompiler_ternary.kernel:linear_ternary".
LINEAR_TERNARY = register_op(
    "linear_ternary(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int in_features) -> Tensor",
    reference=reference,
    fake=fake,
)
