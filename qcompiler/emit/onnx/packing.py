"""Stored weights in the layouts of onnxruntime's operators.

MatMulNBits (2, 4, 8 bits): `B` uint8 [N, blocks, block_size·bits/8], codes of a row in order, the first
in the lowest bits of a byte; `scales` [N, blocks]; `zero_points` uint8 [N, ceil(blocks·bits/8)], packed
the same way. w = (code - zero) · scale; a last block that is short is padded.

MatMulBnb4: `B` uint8, the codes of the row-major weight, the first of a pair in the high nibble;
`absmax` float, one per block of the flattened weight: that is lut4's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec, num_groups
from qcompiler.kernels.formats.int8_channel import Int8ChannelSpec

Read = Callable[[str], torch.Tensor]
MAX_BLOCK = 256
MIN_BLOCK = 16


@dataclass(frozen=True)
class Blocks:
    """How one weight [rows, columns] is cut for MatMulNBits."""

    bits: int
    rows: int
    columns: int
    block_size: int

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.block_size)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape of `B`."""
        return (self.rows, self.count, self.block_size * self.bits // 8)

    @property
    def zero_shape(self) -> tuple[int, int]:
        """Shape of packed `zero_points`."""
        return (self.rows, -(-self.count * self.bits // 8))


def blocks_of(spec: AffineSpec | Int8ChannelSpec, rows: int, columns: int) -> Blocks:
    """The blocks for a weight: its own groups, or, where a row is one group, blocks that repeat its scale."""
    size = spec.group_size if isinstance(spec, AffineSpec) else 0
    if size == 0:
        size = MIN_BLOCK
        while size < min(columns, MAX_BLOCK):
            size *= 2
    return Blocks(spec.bits, rows, columns, size)


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n] with values below 2^bits as uint8 [rows, ceil(n·bits/8)], low bits first."""
    per_byte = 8 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_byte))
    if per_byte == 1:
        return values.contiguous()
    parts = values.reshape(values.shape[0], -1, per_byte)
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


class AffineWeight:
    """One affine weight read when it is asked for."""

    def __init__(self, spec: AffineSpec, names: Mapping[str, str], in_features: int, read: Read):
        self._spec = spec
        self._names = names
        self._columns = in_features
        self._read = read

    def codes(self, blocks: Blocks) -> torch.Tensor:
        """`B` for MatMulNBits."""
        tensors = {part: self._read(name) for part, name in self._names.items()}
        codes, _, _ = AFFINE.unpack(self._spec, tensors, self._columns)
        codes = torch.nn.functional.pad(codes, (0, blocks.count * blocks.block_size - self._columns))
        return pack_bits(codes, blocks.bits).reshape(blocks.code_shape)

    def scales(self, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
        """`scales`."""
        return self._per_block("scales", blocks).to(dtype)

    def zeros(self, blocks: Blocks) -> torch.Tensor:
        """Packed `zero_points`.

        Raises:
            InvalidInputError: A zero point is no code.
        """
        zeros = self._per_block("zeros", blocks).float()
        if not are_codes(zeros, blocks.bits):
            raise InvalidInputError(
                f"{self._names['zeros']}: its zero points are no codes of {blocks.bits} bits"
            )
        return pack_bits(zeros.to(torch.uint8), blocks.bits)

    def float_zeros(self, blocks: Blocks, dtype: torch.dtype) -> torch.Tensor:
        """`zero_points` as numbers of the activation dtype."""
        return self._per_block("zeros", blocks).to(dtype)

    def _per_block(self, part: str, blocks: Blocks) -> torch.Tensor:
        values = self._read(self._names[part]).t()
        if num_groups(self._spec.group_size, self._columns) == 1:
            values = values.expand(-1, blocks.count)
        return values.contiguous()


def are_codes(zeros: torch.Tensor, bits: int) -> bool:
    """Whether zero points are integers that `bits` bits hold."""
    zeros = zeros.float()
    return bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 2**bits - 1)).all())


def pack_int8(codes: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """int8 [N, K] as `B` of 8 bits, whose zero point is 128 where none is given."""
    shifted = (codes.to(torch.int16) + 128).to(torch.uint8)
    # Padding meets no input; 128 makes it zero all the same.
    padding = blocks.count * blocks.block_size - blocks.columns
    return torch.nn.functional.pad(shifted, (0, padding), value=128).reshape(blocks.code_shape)
