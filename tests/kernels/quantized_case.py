"""Paged cases over a quantized cache; what belongs to no key is poisoned: any codes, scales of NaN."""

from __future__ import annotations

import torch
from paged_case import PagedCase

from qcompiler.kernels.formats.kv_cache import kv_format


def quantized(case: PagedCase, name: str, dtype=torch.float32, device="cpu", by_head=False):
    """(arguments of paged_attention_quantized, what they should give float32).

    `by_head` lays the pages out as the runtime does on a GPU, one head after the other.
    """
    arguments, parts, chosen = case.build(dtype, device)
    q, k_pages, v_pages, *metadata = arguments
    options, rest = metadata[4:], metadata[:4]
    stored = [quantized_pages(pages, name, by_head) for pages in (k_pages, v_pages)]
    given = [(q, *(rounded(t, name) for t in pair)) for q, *pair in parts]
    expected = case.expected([tuple(t.float() for t in part) for part in given], chosen)
    caches = (stored[0][0], stored[1][0], stored[0][1], stored[1][1])
    return (q, *caches, *rest, case.channels, name, *options), expected


def quantized_pages(pages, name, by_head=False):
    """Words and scales of plain pages whose unused rows are NaN."""
    chosen = kv_format(name)
    unused = pages.isnan().any(-1)
    words, scales = chosen.quantize(pages.nan_to_num())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(-32768, 32768, words.shape, generator=generator).to(words)
    words[unused] = noise[unused]
    scales[unused] = float("nan")
    if by_head:
        words, scales = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (words, scales))
    return words, scales


def rounded(x, name):
    """Keys or values [1, H, n, D] as the cache gives them back, float32."""
    chosen = kv_format(name)
    rows = x.transpose(1, 2)
    return chosen.dequantize(*chosen.quantize(rows), x.shape[-1]).transpose(1, 2)
