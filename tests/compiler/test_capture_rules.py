"""The rules of capture one by one: masks, attention arguments, looking across tokens, in-place ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from transformers import masking_utils as tm

from qcompiler.capture.attention import attention_forward
from qcompiler.capture.graph import GraphBuilder
from qcompiler.capture.interpret import GraphRunner
from qcompiler.capture.masks import MaskSpec, describe, mask_interface, spec_of
from qcompiler.capture.ragged import check_ragged, indices_to_positions
from qcompiler.kernels.errors import UnsupportedModelError

# Masks: the spec of transformers' composed mask functions.


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        (tm.causal_mask_function, MaskSpec(causal=True)),
        (tm.bidirectional_mask_function, MaskSpec(causal=False)),
        (tm.sliding_window_causal_mask_function(6), MaskSpec(causal=True, window=6)),
        (tm.chunked_causal_mask_function(8, torch.zeros(1)), MaskSpec(causal=True, chunk=8)),
        (
            tm.and_masks(tm.packed_sequence_mask_function(torch.zeros(1, 4)), tm.causal_mask_function),
            MaskSpec(causal=True),
        ),
    ],
)
def test_known_mask_functions_have_a_spec(function: Callable[..., Any], spec: MaskSpec) -> None:
    assert describe(function) == spec


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_window_means_what_the_op_means(window: int, causal: bool) -> None:
    """Which keys transformers' function shows is which keys the op sees."""
    if causal:
        function = tm.sliding_window_causal_mask_function(window)
    elif hasattr(tm, "sliding_window_bidirectional_mask_function"):
        function = tm.sliding_window_bidirectional_mask_function(window)
    else:
        pytest.skip("this transformers has no bidirectional window")
    spec = describe(function)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]
    shown = function(0, 0, i, j)
    values = torch.eye(12)[None, None]
    scores = torch.zeros(1, 1, 12, 4)
    seen = torch.ops.qcompiler.attention(
        scores, scores, values, 1.0, spec.causal, spec.window, spec.chunk, 0.0, None
    )
    assert torch.equal(seen[0, :, 0] > 0, shown)


def own_rule(batch: Any, head: Any, q: Any, kv: Any) -> Any:
    return kv <= q + 1


@pytest.mark.parametrize(
    "function",
    [
        own_rule,
        tm.and_masks(tm.causal_mask_function, own_rule),
        tm.or_masks(tm.causal_mask_function, tm.bidirectional_mask_function),
        tm.and_masks(tm.sliding_window_overlay(4), tm.bidirectional_mask_function),
    ],
)
def test_other_mask_functions_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="mask"):
        describe(function)


def test_refused_mask_matters_only_to_a_layer_that_uses_it() -> None:
    mask = mask_interface(batch_size=1, q_length=4, kv_length=4, mask_function=own_rule)
    with pytest.raises(UnsupportedModelError, match="own_rule"):
        spec_of(mask)


# Attention: refused rather than dropped.

Q = torch.zeros(1, 4, 3, 8)
KV = torch.zeros(1, 2, 3, 8)


def call(mask: Tensor | None = None, **options: Any) -> Tensor:
    return attention_forward(torch.nn.Identity(), Q, KV, KV, mask, **options)[0]


def causal_mask(window: int = 0) -> Tensor:
    function = tm.sliding_window_causal_mask_function(window) if window else tm.causal_mask_function
    return mask_interface(batch_size=1, q_length=3, kv_length=3, mask_function=function)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"head_mask": torch.zeros(1)}, "head_mask"),
        ({"something_new": 3}, "something_new"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 2}, "window"),
    ],
)
def test_unknown_attention_arguments_are_refused_by_name(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModelError, match=word):
        call(causal_mask(), **options)


def test_mask_of_the_models_own_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        call(causal_mask().float() * 2)


def test_attention_without_any_word_on_causality_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="is_causal"):
        call(None)


def test_inert_arguments_and_agreeing_windows_pass() -> None:
    assert call(causal_mask(2), sliding_window=2, position_ids=torch.zeros(1), use_cache=False).shape == (
        1,
        3,
        4,
        8,
    )
    assert call(None, is_causal=True).shape == (1, 3, 4, 8)


# Graphs: a small program, exported and cleaned as a model is.


class Program(torch.nn.Module):
    """Embeds tokens, attends, and does one thing more to the hidden states [1, T, 16]."""

    def __init__(self, more: Callable[..., Tensor]):
        super().__init__()
        self.model = torch.nn.Embedding(32, 16, device="meta")
        self.more = more

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.model(input_ids)
        heads = hidden.view(1, -1, 2, 8).transpose(1, 2)
        hidden = torch.ops.qcompiler.attention(heads, heads, heads, 1.0, True, 0, 0, 0.0, None).reshape(
            hidden.shape
        )
        return self.more(hidden, position_ids)


def graph_of(more: Callable[..., Tensor]) -> fx.GraphModule:
    program = Program(more)
    ids = torch.zeros(1, 11, dtype=torch.long, device="meta")
    dim = torch.export.Dim("T", min=1)
    with torch.no_grad():
        exported = torch.export.export(
            program, (ids, ids.clone()), strict=False, dynamic_shapes=({1: dim}, {1: dim})
        )
    return GraphBuilder(exported, "model", {"weight": "weight"}, {"weight": program.model.weight}).build()


HARMLESS: dict[str, Callable[..., Tensor]] = {
    "elementwise": lambda h, p: h * torch.sigmoid(h),
    "norm over channels": lambda h, p: h / h.pow(2).mean(-1, keepdim=True),
    "softmax over channels": lambda h, p: h.softmax(-1),
    "slice of channels": lambda h, p: torch.cat([h[..., 8:], h[..., :8]], -1),
    "scale by position": lambda h, p: h * p[..., None],
    "flattened tokens": lambda h, p: h.view(-1, 16).cumsum(-1).view(1, -1, 16),
}
ACROSS: dict[str, Callable[..., Tensor]] = {
    "mean over tokens": lambda h, p: h - h.mean(1, keepdim=True),
    "cumsum over tokens": lambda h, p: h.cumsum(1),
    "softmax over tokens": lambda h, p: h.softmax(1),
    "largest position": lambda h, p: h * p.max(),
    "position differences": lambda h, p: h * torch.diff(p, prepend=p[:, :1], dim=-1)[..., None],
    "first token": lambda h, p: h[:, 0],
    "shifted tokens": lambda h, p: torch.nn.functional.pad(h, (0, 0, 1, 0))[:, :-1],
    "flipped tokens": lambda h, p: h.flip(1),
    "prefix": lambda h, p: torch.cat([torch.zeros_like(h[:, :1]), h], 1),
    "tokens by tokens": lambda h, p: h + (h @ h.transpose(1, 2)).sum(),
    "sum over tokens by matmul": lambda h, p: h @ (h.transpose(1, 2) @ h),
    "sum over tokens by einsum": lambda h, p: h @ torch.einsum("btc,btd->bcd", h, h),
    "gather by position": lambda h, p: h[0][p[0]][None],
    "counting tokens": lambda h, p: h * torch.arange(h.shape[1], device=h.device).flip(0)[None, :, None],
    "convolution": lambda h, p: torch.nn.functional.conv1d(
        h.transpose(1, 2), h.new_ones(16, 16, 3), padding=1
    ),
}


@pytest.mark.parametrize("more", HARMLESS.values(), ids=HARMLESS)
def test_row_wise_programs_pass(more: Callable[..., Tensor]) -> None:
    assert check_ragged(graph_of(more)) == "decoder"


@pytest.mark.parametrize("more", ACROSS.values(), ids=ACROSS)
def test_programs_that_look_across_tokens_are_refused(more: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedModelError):
        check_ragged(graph_of(more))


def test_program_without_attention_is_refused() -> None:
    gm = graph_of(lambda h, p: h)
    for node in list(gm.graph.nodes):
        if str(node.target) == "qcompiler.attention.default":
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    with pytest.raises(UnsupportedModelError, match="attention function"):
        check_ragged(gm)


def test_token_indices_become_positions() -> None:
    gm = graph_of(lambda h, p: h * torch.arange(h.shape[1], device=h.device)[None, :, None])
    assert indices_to_positions(gm.graph) == 1
    gm.recompile()
    assert check_ragged(gm) == "decoder"
    weight = torch.randn(32, 16)
    ids, positions = torch.randint(0, 32, (1, 5)), torch.tensor([[0, 1, 2, 0, 1]])
    got = GraphRunner(gm, lambda name: weight, lengths=(3, 2)).logits(ids, positions)
    alone = GraphRunner(gm, lambda name: weight, lengths=(2,)).logits(ids[:, 3:], positions[:, 3:])
    assert torch.allclose(got[:, 3:], alone)


# In-place ops.


def divided(h: Tensor, p: Tensor) -> Tensor:
    h = h * 2
    h /= h.pow(2).sum(-1, keepdim=True) + 1
    return h + 1


def assembled(h: Tensor, p: Tensor) -> Tensor:
    out = h.new_empty(h.shape)
    out[..., :4] = h[..., 12:]
    out[..., 4:] = h[..., :12]
    return out * 2


def masked(h: Tensor, p: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.masked_fill_(h > 0, 1.0)
    return out.add_(h)


@pytest.mark.parametrize("more", [divided, assembled, masked])
def test_in_place_ops_become_functions(more: Callable[..., Tensor]) -> None:
    gm = graph_of(more)
    targets = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert not any(target._schema.is_mutable for target in targets)
    weight = torch.randn(32, 16)
    ids = torch.randint(0, 32, (1, 7))
    program = Program(more)
    program.model = torch.nn.Embedding(32, 16, _weight=weight)
    with torch.no_grad():
        wanted = program(ids, torch.arange(7)[None])
    assert torch.equal(GraphRunner(gm, lambda name: weight).logits(ids, torch.arange(7)[None]), wanted)


def test_slices_that_fill_a_tensor_become_one_cat() -> None:
    targets = [str(node.target) for node in graph_of(assembled).graph.nodes]
    assert targets.count("aten.cat.default") == 1
    assert not any("scatter" in target or "empty" in target for target in targets)


def test_change_seen_through_another_view_is_refused() -> None:
    def aliased(h: Tensor, p: Tensor) -> Tensor:
        h = h * 2
        view = h.view(-1, 16)
        h.mul_(3)
        return view[None] + 1

    with pytest.raises(UnsupportedModelError, match="another view"):
        graph_of(aliased)
