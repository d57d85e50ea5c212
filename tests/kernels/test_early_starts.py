"""Kernels that start early give what they give in turn: eagerly, in CUDA graphs, torch's between them."""

from __future__ import annotations

import itertools

import pytest
import torch

import qcompiler.kernels.ops  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed")

from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.kernels.formats.kv_cache import kv_format
from qcompiler.kernels.ops.linear_affine_sides import pack_sides
from qcompiler.kernels.triton.launch import EARLY, EARLY_WITH_WEIGHTS, IN_TURN, allow_early_starts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

_ops = torch.ops.qcompiler
HEADS, KV_HEADS, D, HIDDEN, INNER, LAYERS, PAGES, PAGE_SIZE, CONTEXT = 8, 2, 64, 512, 1024, 12, 40, 16, 100
ATTENTION = (D**-0.5, True, 0, 0, 0.0, None)


class Chain:
    """Decode steps through layers at a small shape; every kernel is short, so that many overlap."""

    def __init__(self, batch, cache, fused):
        self.batch, self.cache, self.fused = batch, cache, fused
        g = torch.Generator().manual_seed(0)

        def linear(rows, columns):
            spec = AffineSpec(4, 64)
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=g)
            scales = (torch.rand(rows, columns // 64, generator=g) + 0.5) / (4.6 * columns**0.5)
            stored = AFFINE.pack(spec, codes, scales, torch.full_like(scales, 7.5))
            sides = pack_sides(stored["scales"], stored["zeros"], 4, 64, columns, torch.bfloat16)
            return stored["low"].cuda(), None, sides.cuda(), None, 4, 64, columns

        width = (HEADS + 2 * KV_HEADS) * D
        sizes = ((width, HIDDEN), (HIDDEN, HEADS * D), (2 * INNER, HIDDEN), (HIDDEN, INNER))
        self.linears = [[linear(*size) for size in sizes] for _ in range(2)]
        self.norm = (torch.rand(HIDDEN, generator=g) + 0.5).bfloat16().cuda()
        self.x, self.residual = torch.randn(2, 1, batch, HIDDEN, generator=g).bfloat16().cuda()
        self.cos, self.sin = torch.randn(2, batch, D, generator=g).bfloat16().cuda()
        keys = torch.randn(2, PAGES, PAGE_SIZE, KV_HEADS, D, generator=g).bfloat16()
        if cache == "plain":
            self.pages = [page.cuda() for page in keys]
        else:
            pairs = [kv_format(cache).quantize(page) for page in keys]
            self.pages = [part.cuda() for parts in zip(*pairs, strict=True) for part in parts]
        self.kept = [page.clone() for page in self.pages]
        per = PAGES // batch
        self.table = torch.arange(batch * per, dtype=torch.int32, device="cuda").view(batch, per)
        self.start = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.lengths = torch.full((batch,), min(CONTEXT, per * PAGE_SIZE), dtype=torch.int32, device="cuda")
        last = int(self.lengths[0]) - 1
        self.slots = self.table[:, last // PAGE_SIZE].long() * PAGE_SIZE + last % PAGE_SIZE

    def append(self, q, k, v):
        form = () if self.cache == "plain" else (self.cache,)
        if self.fused:
            op = _ops.rotary_kv_append_quantized if form else _ops.rotary_kv_append
            return op(q, k, v, self.cos, self.sin, *self.pages, self.slots, False, *form)
        turn = (self.cos.unsqueeze(1), self.sin.unsqueeze(1), False)
        q, k = (_ops.rotary(x, *turn) for x in (q, k))
        (_ops.kv_append_quantized if form else _ops.kv_append)(k, v, *self.pages, self.slots, *form)
        return q

    def step(self, between):
        """Result of all layers; `between`: kernels of torch stand between ours."""
        x, residual = self.x, self.residual
        for layer in range(LAYERS):
            qkv, out, both, down = self.linears[layer % 2]
            y, residual = _ops.add_rms_norm(x, residual, self.norm, 1e-5, 0.0, True)
            heads = _ops.linear_affine_sides(y, *qkv)[0].view(self.batch, -1, D)
            if between:
                heads = heads * 1.0
            q = self.append(*heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1))
            index = (self.table, self.start, self.lengths, 1)
            if self.cache == "plain":
                y = _ops.paged_attention(q, *self.pages, *index, *ATTENTION)
            else:
                y = _ops.paged_attention_quantized(q, *self.pages, *index, D, self.cache, *ATTENTION)
            y = _ops.linear_affine_sides(y.flatten(1)[None], *out)
            y, residual = _ops.add_rms_norm(y + 0.0 if between else y, residual, self.norm, 1e-5, 0.0, True)
            if self.fused:
                y = _ops.linear_affine_sides_gated(y, *both, "silu")
            else:
                y = _ops.silu_mul(*_ops.linear_affine_sides(y, *both).chunk(2, dim=-1))
            x = _ops.linear_affine_sides(y, *down)
        return x, residual

    def reset(self):
        for page, kept in zip(self.pages, self.kept, strict=True):
            page.copy_(kept)


@pytest.fixture
def one_after_the_other():
    """Runs a step without early starts."""

    def call(chain):
        before = allow_early_starts(IN_TURN)
        try:
            chain.reset()
            return [t.clone() for t in (*chain.step(False), *chain.pages)]
        finally:
            allow_early_starts(before)

    return call


@pytest.fixture(params=[EARLY, EARLY_WITH_WEIGHTS], ids=["early", "early with weights"])
def level(request):
    """How kernels start in a test."""
    before = allow_early_starts(request.param)
    yield request.param
    allow_early_starts(before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cache", ["plain", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 10])
def test_a_decode_step_is_the_same_bit_for_bit(one_after_the_other, level, batch, cache, fused):
    chain = Chain(batch, cache, fused)
    wanted = one_after_the_other(chain)
    assert wanted[0].isfinite().all()
    for _, between in itertools.product(range(10), (False, True)):
        chain.reset()
        got = (*chain.step(between), *chain.pages)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain.step(False)
    for replays in range(1, 20):
        chain.reset()
        for _ in range(1 + replays % 3):
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((*got, *chain.pages), wanted, strict=True))
        for tensor in got:
            tensor.fill_(torch.nan)


def test_a_weight_that_was_written_just_before_is_read_as_written(one_after_the_other, level):
    """What is fetched before the wait goes to the cache; a kernel reads what stands there after it."""
    chain = Chain(1, "plain", True)
    wanted = one_after_the_other(chain)
    linears, norm = chain.linears, chain.norm
    low = linears[0][0][0]
    for _ in range(20):
        kept, kept_norm = low.clone(), norm.clone()
        low.zero_()
        norm.zero_()
        low.copy_(kept)
        norm.copy_(kept_norm)
        chain.reset()
        assert torch.equal(chain.step(False)[0], wanted[0])
