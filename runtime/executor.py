"""Runs ragged steps of a decoder: the program, its KV pages, and CUDA graphs for decode.

Decode steps are small and many, so on a GPU they are captured as CUDA graphs
for a few numbers of sequences and widths of the block table, at first use.
A token that a run leads to may feed the next run without passing the host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Any

import torch

from qcompiler.runtime.batch import DecodeRows, IndexBuffer, Span, StepBatch
from qcompiler.runtime.pages import PageSpec, allocate_pages
from qcompiler.runtime.program import GraphRunError, Program
from qcompiler.runtime.sampling import draw, greedy

log = logging.getLogger(__name__)

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_MIN_TABLE = 8
# Rows whose tokens are kept for the next run; as many as sequences can run at once.
_MAX_ROWS = 4096 + DECODE_SIZES[-1]


class Executor:
    """A program with pages.

    Args:
        program: The decoder.
        specs: Its page inputs.
        num_pages: Pages to allocate in each.
        page_size: Tokens per page.
        position_offset: Position id of a sequence's first token.
        cuda_graphs: Capture decode steps; only on CUDA.
        token_kernels: On a GPU, choose and hand on tokens by kernels made for it, not by torch's.
    """

    def __init__(
        self,
        program: Program,
        specs: list[PageSpec],
        num_pages: int,
        page_size: int,
        *,
        position_offset: int = 0,
        cuda_graphs: bool = True,
        token_kernels: bool = True,
    ):
        self.program = program
        self.device = program.device
        self.page_size = page_size
        self.num_pages = num_pages
        self.position_offset = position_offset
        self.pages = allocate_pages(specs, num_pages, page_size, self.device)
        self._token_kernels = token_kernels and self.device.type == "cuda"
        self._use_graphs = cuda_graphs and self.device.type == "cuda"
        self._graphs: dict[tuple[int, int], _DecodeGraph] = {}
        self._pool: Any = None
        self._capture_stream: Any = None  # torch's own
        self._tokens = torch.zeros(_MAX_ROWS, dtype=torch.int64, device=self.device)
        self._replayed: tuple[torch.Tensor, torch.Tensor] | None = None  # logits and their likeliest tokens

    def run(self, spans: list[Span]) -> torch.Tensor:
        """Logits [rows, vocabulary] of one step, in the order of the spans; valid until the next step.

        A span that is fed takes its token from what `keep` was given after the run before.
        """
        self._replayed = None
        batch = StepBatch(spans, self.page_size, self.position_offset)
        if self._use_graphs and batch.is_decode and len(spans) <= DECODE_SIZES[-1]:
            return self._replay(batch)
        arrays = batch.arrays()
        width = batch.max_pages
        feeds = batch.feeds
        if feeds is not None:
            arrays["feeds"] = feeds
        buffer = IndexBuffer(
            {
                **({} if feeds is None else {"feeds": (batch.num_tokens,)}),
                "input_ids": (1, batch.num_tokens),
                "position_ids": (1, batch.num_tokens),
                "logits_rows": (len(arrays["logits_rows"]),),
                "slots": (batch.num_tokens,),
                "block_table": (len(spans), width),
                "query_start": (len(spans) + 1,),
                "seq_lens": (len(spans),),
            },
            self.device,
        )
        buffer.fill(arrays)
        return self._call(buffer.tensors, batch.max_query_len)

    def likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """`greedy` of the logits that the last run gave, which a CUDA graph has computed with them."""
        if self._replayed is not None and logits is self._replayed[0]:
            return self._replayed[1]
        return greedy(logits)

    @torch.inference_mode()
    def keep(self, tokens: torch.Tensor) -> None:
        """Keep the tokens [rows] that the last run led to for the next one's spans, on the device."""
        if self._replayed is not None and tokens is self._replayed[1]:
            return  # the graph has done so itself
        self._tokens[: tokens.shape[0]] = tokens

    @torch.inference_mode()
    def _call(self, tensors: dict[str, torch.Tensor], max_query_len: int) -> torch.Tensor:
        feeds = tensors.get("feeds")
        if feeds is not None:
            # A row of NaN has token −1; what comes of it is thrown away, but it must be in the vocabulary.
            tensors = {**tensors, "input_ids": self._fed(tensors["input_ids"], feeds)}
        (logits, *_) = self.program({**tensors, **self.pages, "max_query_len": max_query_len})
        return logits[0]

    def _fed(self, ids: torch.Tensor, feeds: torch.Tensor) -> torch.Tensor:
        """Token ids [1, tokens], those with a feed taken from the kept ones."""
        if self._token_kernels:
            from qcompiler.kernels.triton.tokens import feed_tokens

            return feed_tokens(ids, feeds, self._tokens)
        return torch.where(feeds < 0, ids, self._tokens[feeds.clamp_min(0)].clamp_min(0))

    def _greedy_kept(self, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row [rows], which `kept` gets too."""
        if self._token_kernels and logits.stride(-1) == 1:
            from qcompiler.kernels.triton.tokens import greedy_tokens

            return greedy_tokens(logits, kept)
        tokens = greedy(logits)
        kept[: tokens.shape[0]] = tokens
        return tokens

    def warm_up(self, sequences: int | Seq[int]) -> None:
        """Capture decode steps of short contexts now: of these numbers of sequences, or of all up to one."""
        if isinstance(sequences, int):
            most = next((s for s in DECODE_SIZES if s >= sequences), DECODE_SIZES[-1])
            sequences = [s for s in DECODE_SIZES if s <= most]
        for number in sequences:
            count = next((s for s in DECODE_SIZES if s >= number), None)
            if self._use_graphs and count is not None:
                self._graph(count, _MIN_TABLE)
        for graph in list(self._graphs.values())[:1]:
            graph.draw()

    def _replay(self, batch: StepBatch) -> torch.Tensor:
        width = _MIN_TABLE
        while width < batch.max_pages:
            width *= 2
        graph = self._graph(next(s for s in DECODE_SIZES if s >= len(batch.spans)), width)
        if graph is None:
            return self.run(list(batch.spans))
        logits, tokens = graph.replay(batch.spans)
        self._replayed = logits[: len(batch.spans)], tokens[: len(batch.spans)]
        return self._replayed[0]

    def _graph(self, count: int, width: int) -> _DecodeGraph | None:
        """The captured step; None if none can be captured."""
        graph = self._graphs.get((count, width))
        if graph is not None:
            return graph
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            if torch.cuda.device_count() > 1:
                # Torch's own is on the device that was current when it was first needed, for all captures.
                self._capture_stream = torch.cuda.Stream(self.device)
        try:
            graph = self._graphs[count, width] = _DecodeGraph(self, count, width, self._pool)
        except (RuntimeError, GraphRunError) as e:
            # Some op waits for the device, which a capture cannot; the step itself can run.
            log.warning("decode runs without CUDA graphs: %s", e)
            self._use_graphs = False
        return graph


class _DecodeGraph:
    """One captured decode step of `count` sequences with `width` columns in the block table."""

    def __init__(self, executor: Executor, count: int, width: int, pool: Any):
        self._buffer = IndexBuffer(
            {
                "input_ids": (1, count),
                "position_ids": (1, count),
                "logits_rows": (count,),
                "slots": (count,),
                "feeds": (count,),
                "block_table": (count, width),
                "query_start": (count + 1,),
                "seq_lens": (count,),
            },
            executor.device,
            blocks=2,
        )
        # Sequences of one token, written to no slot: warm-up compiles the kernels and touches no page.
        empty = StepBatch([Span([0], 0, [0], [0])] * count, executor.page_size, executor.position_offset)
        arrays = empty.arrays(pages=width)
        arrays["slots"] = [-1] * count
        arrays["feeds"] = [-1] * count
        self._buffer.fill(arrays)
        stream = torch.cuda.Stream(executor.device)
        stream.wait_stream(torch.cuda.current_stream(executor.device))
        unused = torch.zeros_like(executor._tokens[:count])  # what is kept of the step before feeds the next
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):
                executor._greedy_kept(executor._call(self._buffer.tensors, 1), unused)
        torch.cuda.current_stream(executor.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool, executor._capture_stream), torch.inference_mode():
            self._logits = executor._call(self._buffer.tensors, 1)
            self._tokens = executor._greedy_kept(self._logits, executor._tokens)
        self._rows = [
            DecodeRows(views, executor.page_size, executor.position_offset)
            for views in self._buffer.host_views
        ]

    @torch.inference_mode()
    def draw(self) -> None:
        """Draw a token from whatever the logits are, so that the kernels for it are compiled."""
        number = torch.zeros(1, dtype=torch.float64, device=self._logits.device)
        draw(self._logits[:1].float(), number)

    def replay(self, spans: Seq[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        self._rows[self._buffer.acquire()].write(spans)
        self._buffer.send()
        self._graph.replay()
        return self._logits, self._tokens
