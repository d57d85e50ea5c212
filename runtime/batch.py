"""One step's work laid end to end: tokens of several sequences, and where each finds its cache."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in this step.

    Args:
        tokens: Token ids to compute.
        start: How many of the sequence's tokens are in the cache already.
        pages: The sequence's pages, in order; a list that is only ever appended to.
        rows: Which of `tokens` need logits, by index.
        feed: Row of the run before whose token, which the host does not know yet, stands for the only one
            of `tokens`.
    """

    tokens: Seq[int]
    start: int
    pages: Seq[int]
    rows: Seq[int]
    feed: int | None = None


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
    def feeds(self) -> list[int] | None:
        """For each token the row of the run before that it comes from, −1 if none; None if all are known."""
        if all(s.feed is None for s in self.spans):
            return None
        return [-1 if s.feed is None else s.feed for s in self.spans for _ in s.tokens]

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
    "feeds": torch.int64,
}


class IndexBuffer:
    """The integer inputs of a step in one block of memory on each side, so that one copy moves them all.

    Args:
        sizes: Shape of each input by name.
        device: Where `tensors` live.
        blocks: How many blocks to keep on the host of a GPU: one is written while another is copied.
    """

    def __init__(self, sizes: dict[str, tuple[int, ...]], device: torch.device, blocks: int = 1):
        offsets, total = {}, 0
        for name, shape in sizes.items():
            offsets[name] = total
            count = INDEX_DTYPES[name].itemsize
            for s in shape:
                count *= s
            total += -(-count // 16) * 16

        def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
            return {n: _view(base, offsets[n], sizes[n], INDEX_DTYPES[n]) for n in sizes}

        self._pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(total, dtype=torch.uint8, pin_memory=self._pinned)
            for _ in range(blocks if self._pinned else 1)
        ]
        self._sent: list[torch.cuda.Event | None] = [None] * len(self._hosts)
        self._device = (
            torch.zeros(total, dtype=torch.uint8, device=device) if self._pinned else self._hosts[0]
        )
        self._next = 0
        self.host_views = [{n: v.numpy() for n, v in views(host).items()} for host in self._hosts]
        self.tensors = views(self._device)

    def acquire(self) -> int:
        """Index into `host_views` of the block to write next, which no copy reads any more."""
        event = self._sent[self._next]
        if event is not None:
            event.synchronize()
        return self._next

    def send(self) -> None:
        """Copy the block to the device, behind the work that was given to it before."""
        if not self._pinned:
            return
        self._device.copy_(self._hosts[self._next], non_blocking=True)
        event = self._sent[self._next] or torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device.device))
        self._sent[self._next] = event
        self._next = (self._next + 1) % len(self._hosts)

    def fill(self, arrays: dict[str, list[Any]]) -> None:
        """Set every input from lists and copy them to the device."""
        for name, view in self.host_views[self.acquire()].items():
            view[...] = arrays[name]
        self.send()


def _view(base: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = dtype.itemsize
    for s in shape:
        count *= s
    return base[offset : offset + count].view(dtype).view(shape)


class DecodeRows:
    """The inputs of padded decode steps, one after the other, in one block of the host.

    Most of a step is like the one before it, so only what changed is written: a block table row grows
    by a page now and then.

    Args:
        views: Arrays of a step's inputs by name; see `IndexBuffer`.
        page_size: Tokens per page.
        position_offset: Position id of a sequence's first token.
    """

    def __init__(self, views: dict[str, np.ndarray[Any, Any]], page_size: int, position_offset: int):
        self._views = views
        self._page_size = page_size
        self._offset = position_offset
        self._count = views["block_table"].shape[0]
        self._rows = 0
        self._pages: list[Seq[int] | None] = [None] * self._count
        self._used = [0] * self._count
        views["logits_rows"][:] = np.arange(self._count)
        self._pad(0, self._count)

    def _pad(self, start: int, stop: int) -> None:
        views = self._views
        views["input_ids"][0, start:stop] = 0
        views["position_ids"][0, start:stop] = self._offset
        views["slots"][start:stop] = -1
        views["feeds"][start:stop] = -1
        views["seq_lens"][start:stop] = 0
        views["block_table"][start:stop] = 0
        for row in range(start, stop):
            self._pages[row], self._used[row] = None, 0

    def write(self, spans: Seq[Span]) -> None:
        """Write a step; as `StepBatch.arrays` padded to as many sequences and pages."""
        count, size, views = len(spans), self._page_size, self._views
        if count != self._rows:
            if count < self._rows:
                self._pad(count, self._rows)
            views["query_start"][:] = np.minimum(np.arange(self._count + 1), count)
            self._rows = count
        starts = np.array([s.start for s in spans])
        views["input_ids"][0, :count] = [s.tokens[0] for s in spans]
        views["feeds"][:count] = [-1 if s.feed is None else s.feed for s in spans]
        views["position_ids"][0, :count] = starts + self._offset
        views["seq_lens"][:count] = starts + 1
        last = [s.pages[s.start // size] for s in spans]
        views["slots"][:count] = np.array(last) * size + starts % size
        table = views["block_table"]
        for row, span in enumerate(spans):
            used, before = span.start // size + 1, self._used[row]
            if self._pages[row] is not span.pages or used < before:
                table[row, :used] = span.pages[:used]
                table[row, used:] = 0
                self._pages[row] = span.pages
            elif used > before:
                table[row, before:used] = span.pages[before:used]
            self._used[row] = used
