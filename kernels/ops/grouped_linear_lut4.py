"""`qcompiler::grouped_linear_lut4`: one linear per expert, all weights in one lut4 tensor set.

    y[r] = x[r] · W[e]ᵀ + bias[e]      for offsets[e − 1] ≤ r < offsets[e]

The weights [experts, out_features, in_features] are laid side by side as `formats/lut4.py` says: expert e
owns the rows from e·out_features on, and has blocks and an offset of its own. Rows of x from offsets[-1]
on belong to no expert and give zeros.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.lut4 import NESTED_BLOCK, dequantize_lut4, num_blocks
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.grouped_linear import by_expert, outputs_per_expert
from qcompiler.kernels.ops.linear_lut4 import check_linear_lut4

SCHEMA = (
    "grouped_linear_lut4(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, "
    "Tensor? nested_offset, Tensor? part_rows, Tensor offsets, Tensor? bias, str quant_type, "
    "int block_size, int in_features) -> Tensor"
)


def check_grouped_linear_lut4(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> int:
    """Refuse arguments whose shapes do not fit together; gives the out_features of one expert.

    Raises:
        InvalidInputError: Names the argument.
    """
    op = "grouped_linear_lut4"
    check_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, quant_type, block_size, in_features, op
    )
    outputs = outputs_per_expert(op, x, codes.shape[0], offsets, bias)
    experts = offsets.shape[0]
    blocks = num_blocks(block_size, outputs, in_features)
    sizes = {
        "part_rows": (part_rows, experts),
        "absmax": (absmax, experts * blocks),
        "nested_absmax": (nested_absmax, experts * -(-blocks // NESTED_BLOCK)),
    }
    for name, (tensor, size) in sizes.items():
        if tensor is not None and tensor.numel() != size:
            raise InvalidInputError(
                f"{op}: {name} is {list(tensor.shape)}; {experts} experts of {outputs} rows "
                f"need {size} values."
            )
    return outputs


def grouped_linear_lut4_reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dequantize the experts that have rows to float32, one at a time; float32 sums, cast once.

    Args:
        x: [rows, in_features], rows sorted by expert, any floating dtype.
        codes: uint8 [experts·out_features, in_features/2], the even element in the high nibble.
        absmax: float32 or uint8, the experts' after each other; see `linear_lut4`.
        nested_absmax: float32 [experts·ceil(blocks/256)] with uint8 absmax, else None.
        nested_offset: float32 [experts] with uint8 absmax, else None.
        part_rows: int32 [experts], each out_features; None where the format stores none.
        offsets: int32 [experts], the end of each expert's rows.
        bias: [experts, out_features] or None.
        quant_type: "nf4" or "fp4".
        block_size: Weights per absmax.
        in_features: K, even.

    Returns:
        [rows, out_features] in x.dtype.
    """
    outputs = check_grouped_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, offsets, bias,
        quant_type, block_size, in_features,
    )  # fmt: skip
    experts = offsets.shape[0]

    def share(tensor: torch.Tensor | None, expert: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.flatten().view(experts, -1)[expert]

    def weight(expert: int) -> torch.Tensor:
        return dequantize_lut4(
            codes[expert * outputs : (expert + 1) * outputs],
            absmax.flatten().view(experts, -1)[expert],
            share(nested_absmax, expert),
            share(nested_offset, expert),
            share(part_rows, expert),
            quant_type,
            block_size,
            in_features,
        )

    return by_expert(x, weight, outputs, offsets, bias)


def grouped_linear_lut4_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    part_rows: torch.Tensor | None,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> torch.Tensor:
    """Shape and dtype of the result: [rows, out_features] in x.dtype."""
    outputs = check_grouped_linear_lut4(
        x, codes, absmax, nested_absmax, nested_offset, part_rows, offsets, bias,
        quant_type, block_size, in_features,
    )  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


GROUPED_LINEAR_LUT4 = register_op(
    SCHEMA,
    reference=grouped_linear_lut4_reference,
    fake=grouped_linear_lut4_fake,
    cuda="qcompiler.kernels.triton.grouped.lut4:grouped_linear_lut4_triton",
)
