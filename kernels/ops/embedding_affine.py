"""`qcompiler::embedding_affine`: rows of a table stored in the affine format, gathered and dequantized.

The table [num_embeddings, embedding_dim] is stored like a linear's weight
(`formats/affine.py`) with groups along embedding_dim, so an output head tied to
it reads the very same tensors through `linear_affine`.
"""

from __future__ import annotations

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import dequantize_affine
from qcompiler.kernels.library import register_op
from qcompiler.kernels.ops.linear_affine import check_affine_tensors

SCHEMA = (
    "embedding_affine(Tensor ids, Tensor low, Tensor? high, Tensor scales, Tensor zeros, int bits, "
    "int group_size, int embedding_dim, ScalarType dtype) -> Tensor"
)


def check_embedding_affine(
    ids: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    embedding_dim: int,
) -> None:
    """Refuse arguments whose shapes or dtypes do not fit together; never waits for a device.

    Raises:
        InvalidInputError: Names the argument.
    """
    op = "embedding_affine"
    if ids.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(f"{op}: ids are {ids.dtype}, not int32 or int64.")
    check_affine_tensors(op, low, high, scales, bits, group_size, embedding_dim)
    if zeros.shape != scales.shape:
        raise InvalidInputError(f"{op}: zeros are {list(zeros.shape)}, scales {list(scales.shape)}.")


def embedding_affine_reference(
    ids: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gather the stored rows, dequantize them in float32, cast once.

    Args:
        ids: int64 or int32 [...], each in [0, num_embeddings).
        low: int32 [num_embeddings, words].
        high: int16 or uint8 [num_embeddings, words] for 3, 5 and 6 bits, else None.
        scales: [groups, num_embeddings].
        zeros: [groups, num_embeddings].
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 16, 32, 64, 128, 256, or 0 for one group per row.
        embedding_dim: K.
        dtype: Of the result.

    Returns:
        [..., embedding_dim] in `dtype`.
    """
    check_embedding_affine(ids, low, high, scales, zeros, bits, group_size, embedding_dim)
    rows = ids.reshape(-1)
    table = dequantize_affine(
        low.index_select(0, rows), None if high is None else high.index_select(0, rows),
        scales.index_select(1, rows), zeros.index_select(1, rows), bits, group_size, embedding_dim,
    )  # fmt: skip
    return table.to(dtype).view(*ids.shape, embedding_dim)


def embedding_affine_fake(
    ids: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor | None,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group_size: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Shape and dtype of the result: [..., embedding_dim] in `dtype`."""
    check_embedding_affine(ids, low, high, scales, zeros, bits, group_size, embedding_dim)
    return low.new_empty((*ids.shape, embedding_dim), dtype=dtype)


EMBEDDING_AFFINE = register_op(
    SCHEMA,
    reference=embedding_affine_reference,
    fake=embedding_affine_fake,
    cuda="qcompiler.kernels.triton.embedding_affine:embedding_affine_triton",
)
