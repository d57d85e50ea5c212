"""Paged KV cache: which pages are free, and their tensors (Kwon et al. 2023, "PagedAttention")."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch

from qcompiler.kernels.errors import ArtifactError, InvalidInputError
from qcompiler.kernels.formats.kv_cache import kv_format
from qcompiler.runtime.graph import DTYPE_BY_NAME, Graph, bind

# The ops on a quantized cache, and what the names of page inputs begin with.
_QUANTIZED_OPS = (
    "qcompiler.kv_append_quantized.default",
    "qcompiler.rotary_kv_append_quantized.default",
    "qcompiler.paged_attention_quantized.default",
)
PAGE_INPUTS = ("k_pages_", "v_pages_", "k_scales_", "v_scales_")


@dataclass(frozen=True)
class PageSpec:
    """Shape of one page input of the graph: [pages, page_size, *row]."""

    name: str
    row: tuple[int, ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in it."""
        count = 1
        for size in self.row:
            count *= size
        return count * self.dtype.itemsize


def page_specs(graph: Graph) -> tuple[list[PageSpec], int | None]:
    """The graph's page inputs, and the page size if the graph fixes it.

    Raises:
        ArtifactError: a page input without a fixed number of heads and channels, or pages and scales that are
            not those of the format that their nodes name.
    """
    specs, sizes = [], set()
    for declared in graph.inputs:
        if not declared.name.startswith(PAGE_INPUTS):
            continue
        shape = declared.shape
        scales = "_scales_" in declared.name
        if len(shape) not in ((3, 4) if scales else (4,)) or not all(isinstance(s, int) for s in shape[2:]):
            wanted = "heads] or [pages, page_size, heads, 2" if scales else "heads, head_dim"
            raise ArtifactError(f"graph.json: input {declared.name!r} is not [pages, page_size, {wanted}]")
        specs.append(PageSpec(declared.name, tuple(int(s) for s in shape[2:]), DTYPE_BY_NAME[declared.dtype]))
        if isinstance(shape[1], int):
            sizes.add(shape[1])
    if len(sizes) > 1 or 0 in sizes:
        raise ArtifactError(f"graph.json: page sizes {sorted(sizes)} do not agree")
    _check_formats(graph, {spec.name: spec for spec in specs})
    return specs, (sizes.pop() if sizes else None)


def _check_formats(graph: Graph, specs: dict[str, PageSpec]) -> None:
    """Hold the pages and scales of a quantized cache against the formats that the nodes on them name."""
    for node in graph.nodes:
        if node.op not in _QUANTIZED_OPS:
            continue
        where = f"graph.json: node {node.name!r} ({node.op})"
        call = bind(node)
        try:
            chosen = kv_format(call["format"])
        except InvalidInputError as e:
            raise ArtifactError(f"{where}: {e.message}", hint=e.hint) from None
        for part in ("k", "v"):
            names = [getattr(call[f"{part}_{kind}"], "name", "") for kind in ("pages", "scales")]
            if any(name not in specs for name in names):
                raise ArtifactError(
                    f"{where}: {part}_pages and {part}_scales must be page inputs of the graph"
                )
            pages, scales = (specs[name] for name in names)
            words = chosen.words(call["channels"]) if part == "v" and "channels" in call else pages.row[1]
            if (
                (pages.dtype, scales.dtype) != (torch.int16, chosen.scale_dtype)
                or pages.row[1] != words
                or scales.row != chosen.scale_row(pages.row[0])
            ):
                raise ArtifactError(
                    f"{where}: {pages.name} {pages.dtype} {list(pages.row)} and {scales.name} {scales.dtype} "
                    f"{list(scales.row)} per token are not a cache of format {chosen.name}"
                )


def allocate_pages(
    specs: list[PageSpec], num_pages: int, page_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Zeroed page tensors [pages, page_size, *row] by input name.

    On the CPU memory is taken only as pages are first written. On a GPU a page holds one head after the
    other, so that the keys which a program reads are neighbours: a view of [pages, heads, page_size, …].
    """
    pages = {}
    for spec in specs:
        shape = (num_pages, page_size, *spec.row)
        if device.type == "cpu":
            # numpy asks the system for zeroed memory, which is not touched until used; torch would fill it.
            raw = np.zeros(num_pages * page_size * spec.token_bytes, dtype=np.uint8)
            pages[spec.name] = torch.from_numpy(raw).view(spec.dtype).view(shape)
        else:
            heads, *rest = spec.row
            by_head = torch.zeros((num_pages, heads, page_size, *rest), dtype=spec.dtype, device=device)
            pages[spec.name] = by_head.transpose(1, 2)
    return pages


class PageAllocator:
    """Hands out pages by number, neighbours together where it can, lowest first."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages))

    @property
    def available(self) -> int:
        """Pages that are free."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages in order, or None if there are not as many."""
        free = self._free
        if count > len(free):
            return None
        start = 0
        for i in range(len(free) - count + 1):
            if free[i + count - 1] - free[i] == count - 1:
                start = i
                break
        taken = free[start : start + count]
        del free[start : start + count]
        return taken

    def release(self, pages: list[int]) -> None:
        """Give pages back.

        Raises:
            InvalidInputError: a page is free already.
        """
        for page in pages:
            at = bisect.bisect_left(self._free, page)
            if at < len(self._free) and self._free[at] == page:
                raise InvalidInputError(f"page {page} was released twice")
            self._free.insert(at, page)
