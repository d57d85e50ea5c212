"""One step's work laid end to end: tokens of several sequences, and where each finds its cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in this step.

    Args:
        tokens: Token ids to compute.
        start: How many of the sequence's tokens are in the cache already.
        pages: The sequence's pages, in order.
        rows: Which of `tokens` need logits, by index.
    """

    tokens: Seq[int]
    start: int
    pages: Seq[int]
    rows: Seq[int]


@dataclass(frozen=True)
class StepBatch:
    """A ragged step; see the graph's inputs for shapes."""

    spans: Seq[Span]
    page_size: int
    position_offset: int

    @property
    def num_tokens(self) -> int:
        """T, all tokens of the step."""
        return sum(len(s.tokens) for s in self.spans)

    @property
    def max_pages(self) -> int:
        """Pages of the longest context in the step."""
        return max(-(-(s.start + len(s.tokens)) // self.page_size) for s in self.spans)

    @property
    def is_decode(self) -> bool:
        """One token per sequence, each with its logits."""
        return all(len(s.tokens) == 1 and len(s.rows) == 1 for s in self.spans)

    def arrays(self, *, sequences: int | None = None, pages: int | None = None) -> dict[str, list[Any]]:
        """The step as lists, padded to `sequences` rows of decode and `pages` columns of the block table.

        A padded row has token 0, slot −1 and lies outside every sequence; a padded sequence is empty.
        """
        count = sequences or len(self.spans)
        width = pages or self.max_pages
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        starts = [0]
        lengths: list[int] = []
        table: list[list[int]] = []
        size = self.page_size
        for span in self.spans:
            base, stop = len(ids), span.start + len(span.tokens)
            ids.extend(span.tokens)
            positions.extend(range(span.start + self.position_offset, stop + self.position_offset))
            slots.extend(span.pages[p // size] * size + p % size for p in range(span.start, stop))
            rows.extend(base + r for r in span.rows)
            starts.append(len(ids))
            lengths.append(stop)
            used = list(span.pages[: -(-stop // size)])
            table.append(used + [0] * (width - len(used)))
        padding = count - len(self.spans)
        if padding:
            rows.extend(range(len(ids), len(ids) + padding))
            ids.extend([0] * padding)
            positions.extend([self.position_offset] * padding)
            slots.extend([-1] * padding)
            starts.extend([starts[-1]] * padding)
            lengths.extend([0] * padding)
            table.extend([[0] * width] * padding)
        return {
            "input_ids": [ids],
            "position_ids": [positions],
            "logits_rows": rows,
            "slots": slots,
            "block_table": table,
            "query_start": starts,
            "seq_lens": lengths,
        }

    @property
    def max_query_len(self) -> int:
        """Most tokens of one sequence."""
        return max(len(s.tokens) for s in self.spans)


INDEX_DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "logits_rows": torch.int64,
    "slots": torch.int64,
    "block_table": torch.int32,
    "query_start": torch.int32,
    "seq_lens": torch.int32,
}


class IndexBuffer:
    """The integer inputs of a step in one block of memory on each side, so that one copy moves them all.

    Args:
        sizes: Shape of each input by name.
        device: Where `tensors` live.
    """

    def __init__(self, sizes: dict[str, tuple[int, ...]], device: torch.device):
        offsets, total = {}, 0
        for name, shape in sizes.items():
            offsets[name] = total
            count = INDEX_DTYPES[name].itemsize
            for s in shape:
                count *= s
            total += -(-count // 16) * 16
        pinned = device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device) if pinned else self._host
        self._views = {n: self._view(self._host, offsets[n], sizes[n], INDEX_DTYPES[n]) for n in sizes}
        self.tensors = {n: self._view(self._device, offsets[n], sizes[n], INDEX_DTYPES[n]) for n in sizes}

    @staticmethod
    def _view(base: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = dtype.itemsize
        for s in shape:
            count *= s
        return base[offset : offset + count].view(dtype).view(shape)

    def fill(self, arrays: dict[str, list[Any]]) -> None:
        """Set every input from lists and copy them to the device."""
        for name, view in self._views.items():
            view.copy_(torch.tensor(arrays[name], dtype=view.dtype).view(view.shape))
        if self._device is not self._host:
            self._device.copy_(self._host, non_blocking=True)
