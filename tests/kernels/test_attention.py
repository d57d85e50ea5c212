"""`qcompiler::attention`: the definition, and the masks, softcap and sinks that others wrote."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from devices import on_triton, on_triton_wide, poisoned, to_target
from tolerances import assert_close
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

import qcompiler.kernels.ops  # noqa: F401
from qcompiler.kernels.errors import InvalidInputError

OP = torch.ops.qcompiler.attention.default
PLAIN = {"scale": 0.25, "causal": True, "window": 0, "chunk": 0, "softcap": 0.0, "sinks": None}

VARIANTS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 4},
    "window-1": {"window": 1},
    "window-both-ways": {"window": 3, "causal": False},
    "chunk": {"chunk": 5},
    "window-and-chunk": {"window": 4, "chunk": 6},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "everything": {"window": 6, "chunk": 9, "softcap": 3.0, "sinks": True},
}
SHAPES = {  # batch, query heads, key heads, queries, keys, D, Dv
    "square": (2, 4, 4, 11, 11, 16, 16),
    "grouped": (1, 6, 2, 9, 9, 16, 16),
    "after-a-prefix": (2, 4, 2, 5, 13, 16, 16),
    "one-query": (2, 6, 2, 1, 13, 16, 16),
    "narrow-values": (1, 4, 2, 7, 7, 24, 8),
    "more-queries-than-keys": (1, 2, 1, 7, 4, 16, 16),
    "single": (1, 1, 1, 1, 1, 16, 16),
}


def tensors(shape, dtype=torch.float32, seed=0):
    batch, heads, kv_heads, rows, keys, dim, channels = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, rows, dim, generator=g)
    k = torch.randn(batch, kv_heads, keys, dim, generator=g)
    v = torch.randn(batch, kv_heads, keys, channels, generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def options(variant, heads):
    chosen = {**PLAIN, **VARIANTS[variant]}
    if chosen["sinks"]:
        chosen["sinks"] = torch.linspace(-1, 1, heads)
    return chosen


def transformers_mask(rows, keys, causal, window, chunk):
    """The mask that transformers' own mask functions give for the last `rows` of `keys` positions."""
    i = torch.arange(keys - rows, keys)[:, None]
    j = torch.arange(keys)[None, :]
    rules = [masking_utils.causal_mask_function] if causal else []
    if window:
        overlay = (
            masking_utils.sliding_window_overlay
            if causal
            else masking_utils.sliding_window_bidirectional_overlay
        )
        rules.append(overlay(window))
    if chunk:
        rules.append(masking_utils.chunked_overlay(chunk, torch.zeros(1, dtype=torch.long)))
    mask = torch.ones(rows, keys, dtype=torch.bool)
    for rule in rules:
        mask = mask & torch.as_tensor(rule(0, 0, i, j))
    return mask


def oracle(q, k, v, scale, causal, window, chunk, softcap, sinks):
    """Softmax attention in float64 with repeated heads, one line per term of the definition."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = scale * torch.einsum("bhid,bhjd->bhij", q.double(), k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = transformers_mask(q.shape[2], k.shape[2], causal, window, chunk)
    weights = torch.exp(scores) * mask
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.double()).view(1, -1, 1, 1)
    weights = torch.where(total > 0, weights / total, 0.0)
    return torch.einsum("bhij,bhjd->bihd", weights, v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_the_definition(variant, shape):
    q, k, v = tensors(SHAPES[shape])
    chosen = options(variant, q.shape[1])
    assert_close(OP(q, k, v, *chosen.values()), oracle(q, k, v, **chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["causal", "everything"])
def test_reference_keeps_the_dtype_and_accumulates_wide(variant, dtype):
    q, k, v = tensors(SHAPES["grouped"], dtype)
    chosen = options(variant, q.shape[1])
    out = OP(q, k, v, *chosen.values())
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, oracle(q, k, v, **chosen))


@pytest.mark.parametrize("window", [0, 300])
def test_long_queries_are_cut_into_blocks_without_a_seam(window):
    q, k, v = tensors((1, 2, 1, 1100, 1200, 8, 8))
    i, j = torch.arange(100, 1200)[:, None], torch.arange(1200)[None, :]
    mask = (j <= i) & ((i - j < window) if window else torch.tensor(True))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
    out = OP(q, k, v, *{**PLAIN, "window": window}.values())
    assert_close(out, wanted.transpose(1, 2))


def test_softcap_and_window_are_those_of_gemma2():
    q, k, v = tensors((2, 4, 2, 9, 9, 16, 16))
    mask = transformers_mask(9, 9, True, 4, 0).double().log()
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    wanted, _ = modeling_gemma2.eager_attention_forward(module, q, k, v, mask, scaling=0.25, softcap=1.5)
    assert_close(OP(q, k, v, *{**PLAIN, "window": 4, "softcap": 1.5}.values()), wanted)


def test_sinks_are_those_of_gpt_oss():
    q, k, v = tensors((2, 4, 2, 9, 9, 16, 16))
    sinks = torch.tensor([-3.0, 0.0, 1.0, 4.0])
    mask = transformers_mask(9, 9, True, 0, 0).float().log()
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    wanted, _ = modeling_gpt_oss.eager_attention_forward(module, q, k, v, mask, scaling=0.25)
    assert_close(OP(q, k, v, *{**PLAIN, "sinks": sinks}.values()), wanted)


def test_no_queries_and_no_keys():
    q, k, v = tensors((1, 2, 2, 0, 5, 16, 8))
    assert OP(q, k, v, *PLAIN.values()).shape == (1, 0, 2, 8)
    q, k, v = tensors((1, 2, 2, 3, 0, 16, 8))
    assert torch.equal(OP(q, k, v, *PLAIN.values()), torch.zeros(1, 3, 2, 8))


@pytest.mark.parametrize("shape", ["grouped", "one-query", "narrow-values"])
@pytest.mark.parametrize("variant", ["causal", "everything"])
def test_opcheck(variant, shape):
    q, k, v = tensors(SHAPES[shape])
    torch.library.opcheck(OP, (q, k, v, *options(variant, q.shape[1]).values()))


def test_heads_that_cannot_be_grouped_are_refused():
    q, k, v = tensors((1, 3, 2, 4, 4, 16, 16))
    with pytest.raises(InvalidInputError, match="3 query heads cannot share 2"):
        OP(q, k, v, *PLAIN.values())


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(InvalidInputError, match="not positive"):
        OP(*tensors(SHAPES["single"]), *{**PLAIN, "scale": scale}.values())


@on_triton_wide
@pytest.mark.parametrize(
    ("variant", "shape"),
    [(variant, "grouped") for variant in VARIANTS]
    + [("everything", shape) for shape in SHAPES]
    + [("causal", "more-queries-than-keys")],
)
def test_kernel_agrees_with_the_definition(variant, shape, target):
    from qcompiler.kernels.triton.attention.launch import dense_attention

    q, k, v = to_target(target, *tensors(SHAPES[shape]))
    chosen = options(variant, q.shape[1])
    wanted = oracle(q.cpu(), k.cpu(), v.cpu(), **chosen)
    if chosen["sinks"] is not None:
        chosen["sinks"] = chosen["sinks"].to(target[0])
    assert_close(dense_attention(poisoned(q), poisoned(k), poisoned(v), *chosen.values()), wanted)


@on_triton
@pytest.mark.parametrize("variant", ["causal", "full", "window", "window-both-ways", "chunk", "everything"])
def test_kernel_over_many_tiles(variant, target):
    from qcompiler.kernels.triton.attention.launch import dense_attention

    scales = {"window": 70, "chunk": 90}  # wider than a tile, so that masked and full tiles both occur
    q, k, v = to_target(target, *tensors((1, 4, 2, 150, 260, 16, 16)))
    chosen = options(variant, q.shape[1])
    chosen |= {name: size for name, size in scales.items() if chosen[name]}
    wanted = oracle(q.cpu(), k.cpu(), v.cpu(), **chosen)
    if chosen["sinks"] is not None:
        chosen["sinks"] = chosen["sinks"].to(target[0])
    assert_close(dense_attention(q, k, v, *chosen.values()), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dimensions_on_cuda(dtype, dim):
    from qcompiler.kernels.triton.attention.launch import dense_attention

    q, k, v = (t.to("cuda", dtype) for t in tensors((2, 8, 2, 300, 700, dim, dim)))
    chosen = {**PLAIN, "scale": dim**-0.5}
    assert_close(dense_attention(q, k, v, *chosen.values()), oracle(q.cpu(), k.cpu(), v.cpu(), **chosen))
