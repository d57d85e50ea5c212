"""Ragged batches over a paged cache whose unused memory is NaN, with a per-sequence oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class PagedCase:
    """Sequences by length of context and of query; `query_lens[s]` ≤ `seq_lens[s]`."""

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    channels: int = 16
    page_size: int = 4
    padding_rows: int = 0
    options: dict = field(default_factory=dict)

    def build(self, dtype=torch.float32, device="cpu"):
        """(arguments of paged_attention, per-sequence (q, k, v) as [1, H, n, D])."""
        g = torch.Generator().manual_seed(0)
        needed = [-(-n // self.page_size) for n in self.seq_lens]
        pages = torch.randperm(sum(needed) + 3, generator=g).tolist()  # three pages belong to nobody
        shape = (len(pages), self.page_size, self.kv_heads)
        k_pages = torch.full((*shape, self.dim), float("nan"), dtype=dtype)
        v_pages = torch.full((*shape, self.channels), float("nan"), dtype=dtype)
        # Entries behind a sequence's last page point far outside the cache: reading one would crash or fault.
        table = torch.full((len(needed), max(needed, default=0) + 2), 2**30, dtype=torch.int32)
        parts = []
        for s, (length, rows) in enumerate(zip(self.seq_lens, self.query_lens, strict=True)):
            q = torch.randn(rows, self.heads, self.dim, generator=g).to(dtype)
            k = torch.randn(length, self.kv_heads, self.dim, generator=g).to(dtype)
            v = torch.randn(length, self.kv_heads, self.channels, generator=g).to(dtype)
            for start in range(0, length, self.page_size):
                page = pages.pop()
                table[s, start // self.page_size] = page
                stop = min(start + self.page_size, length)
                k_pages[page, : stop - start] = k[start:stop]
                v_pages[page, : stop - start] = v[start:stop]
            parts.append(tuple(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)))
        rows = [part[0].shape[2] for part in parts]
        start = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
        padding = torch.full((self.padding_rows, self.heads, self.dim), float("nan"), dtype=dtype)
        q = torch.cat([*(part[0][0].transpose(0, 1) for part in parts), padding])
        chosen = {
            "scale": 0.25,
            "causal": True,
            "window": 0,
            "chunk": 0,
            "softcap": 0.0,
            "sinks": None,
        } | self.options
        if chosen["sinks"]:
            chosen["sinks"] = torch.linspace(-1, 1, self.heads).to(device)
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        moved = [t.to(device) for t in (q, k_pages, v_pages, table, start, seq_lens)]
        return (*moved, max(rows, default=0), *chosen.values()), parts, chosen

    def expected(self, parts, chosen):
        """Each sequence alone through the dense op, zeros for padding."""
        if chosen["sinks"] is not None:
            chosen = chosen | {"sinks": chosen["sinks"].cpu()}
        outs = [torch.ops.qcompiler.attention(*part, *chosen.values())[0] for part in parts]
        return torch.cat([*outs, outs[0].new_zeros(self.padding_rows, self.heads, self.channels)])


CASES = {
    "prefill": PagedCase((9, 33, 5), (9, 33, 5)),
    "chunked-prefill": PagedCase((29, 50), (13, 7)),
    "mixed-with-padding": PagedCase((40, 17, 21), (1, 17, 3), padding_rows=5),
    "empty-sequences": PagedCase((9, 0, 7, 0), (9, 0, 2, 0), padding_rows=1),
    "padded-sequence-with-rows": PagedCase((9, 0, 7), (3, 2, 1)),
    "decode": PagedCase((9, 33, 26, 1), (1, 1, 1, 1)),
    "decode-very-unequal": PagedCase((150, 3, 1), (1, 1, 1)),
    "decode-padded-graph": PagedCase((9, 70, 0, 0), (1, 1, 0, 0), padding_rows=2),
    "decode-padded-rows": PagedCase((9, 0, 33, 0), (1, 1, 1, 1)),
    "decode-one-long": PagedCase((300,), (1,), page_size=16),
    "decode-odd-group": PagedCase((20, 21), (1, 1), heads=6, kv_heads=2, page_size=7),
    "odd-dims": PagedCase((30, 12), (11, 12), heads=6, kv_heads=2, dim=24, channels=40, page_size=3),
    "multi-query": PagedCase((30, 12), (11, 12), heads=20, kv_heads=1),
    "whole-tile-pages": PagedCase((200, 70), (9, 70), page_size=128),
    "window": PagedCase((90, 33), (20, 33), options={"window": 7}),
    "window-decode": PagedCase((90, 3, 33), (1, 1, 1), options={"window": 7}),
    "window-1-decode": PagedCase((90, 3), (1, 1), options={"window": 1}),
    "chunk": PagedCase((90, 33), (20, 33), options={"chunk": 25}),
    "chunk-decode": PagedCase((90, 75, 3), (1, 1, 1), options={"chunk": 25}),
    "softcap-sinks": PagedCase((30, 12), (11, 12), options={"softcap": 2.0, "sinks": True}),
    "softcap-sinks-decode": PagedCase((140, 12, 0), (1, 1, 0), options={"softcap": 2.0, "sinks": True}),
    "full": PagedCase((30, 12), (11, 1), options={"causal": False}),
    "full-window-decode": PagedCase((30, 12), (1, 1), options={"causal": False, "window": 5}),
}
