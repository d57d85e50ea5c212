"""Whole models of other people's making in the shape of ours, with random weights, for `benchmarks.model`.

- a llama written plainly, with a static KV cache, its decode step compiled by `torch.compile` (mode
  "reduce-overhead"): in bfloat16, and with the linears on torch's 4-bit product (tinygemm, groups of 64);
- transformers with the linears of bitsandbytes (nf4), eager, its own `generate`.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.checkpoint import SHAPES

GROUP = 64
_THETA = 500_000.0


class Int4Linear(nn.Module):
    """x · Wᵀ with 4-bit codes, on torch's own kernel; random codes, weights spread as 0.02."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        sides = torch.zeros(inputs // GROUP, outputs, 2, dtype=torch.bfloat16)
        sides[..., 0] = 0.02 / math.sqrt(21)  # the codes' own spread is that of 16 equal steps
        self.register_buffer("sides", sides)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """X [..., inputs] → [..., outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, GROUP, self.sides)
        return y.view(*x.shape[:-1], self.outputs)


class DenseLinear(nn.Module):
    """The same in bfloat16."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(0, 0.02),
            requires_grad=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """X [..., inputs] → [..., outputs]."""
        return F.linear(x, self.weight)


class Block(nn.Module):
    """One decoder layer; Q, K and V are one linear, gate and up another."""

    def __init__(self, sizes: dict[str, int], linear: type[nn.Module], batch: int, room: int):
        super().__init__()
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        self.heads, self.kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.size = hidden // self.heads
        self.qkv = linear(hidden, (self.heads + 2 * self.kv_heads) * self.size)
        self.out = linear(self.heads * self.size, hidden)
        self.gate_up = linear(hidden, 2 * inner)
        self.down = linear(inner, hidden)
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        self.register_buffer("first_norm", ones)
        self.register_buffer("second_norm", ones.clone())
        cache = torch.zeros(2, batch, self.kv_heads, room, self.size, dtype=torch.bfloat16)
        self.register_buffer("keys", cache[0])
        self.register_buffer("values", cache[1])

    def forward(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """X [batch, tokens, hidden] at positions `at`; without a mask the tokens are a whole prompt."""
        x = x + self.attend(norm(x, self.first_norm), at, cos, sin, mask)
        gate, up = self.gate_up(norm(x, self.second_norm)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention over the cache."""
        batch, tokens, _ = x.shape
        parts = self.qkv(x).view(batch, tokens, -1, self.size).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.keys[:, :, at] = k
        self.values[:, :, at] = v
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            repeat = self.heads // self.kv_heads
            keys, values = (c.repeat_interleave(repeat, 1) for c in (self.keys, self.values))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class PlainLlama(nn.Module):
    """Tokens [batch, tokens] → logits of the last one, the cache inside."""

    def __init__(self, shape: str, layers: int | None, *, int4: bool, head_int4: bool, batch: int, room: int):
        super().__init__()
        sizes = SHAPES[shape]
        linear = Int4Linear if int4 else DenseLinear
        count = layers or sizes["num_hidden_layers"]
        self.blocks = nn.ModuleList(Block(sizes, linear, batch, room) for _ in range(count))
        vocabulary, hidden = sizes["vocab_size"], sizes["hidden_size"]
        table = torch.empty(vocabulary, hidden, dtype=torch.bfloat16).normal_(0, 0.02)
        self.register_buffer("table", table)
        self.register_buffer("last_norm", torch.ones(hidden, dtype=torch.bfloat16))
        self.head = (Int4Linear if head_int4 else DenseLinear)(hidden, vocabulary)
        size = hidden // sizes["num_attention_heads"]
        steps = _THETA ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(room).float(), steps)
        angles = torch.cat([angles, angles], dim=1)
        self.register_buffer("cos", angles.cos().to(torch.bfloat16))
        self.register_buffer("sin", angles.sin().to(torch.bfloat16))
        self.register_buffer("causal", torch.ones(room, room, dtype=torch.bool).tril())

    def forward(self, ids: Tensor, at: Tensor, *, whole: bool) -> Tensor:
        """`whole`: a prompt from its beginning."""
        x = F.embedding(ids, self.table)
        cos, sin = self.cos[at], self.sin[at]
        mask = None if whole else self.causal[at]
        for block in self.blocks:
            x = block(x, at, cos, sin, mask)
        return self.head(norm(x[:, -1:], self.last_norm))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm."""
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time, the GPU idle before and after; two runs warm up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    times = []
    for _ in range(repeats + 2):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def plain_llama(options: Any, *, int4: bool, head_int4: bool = False) -> dict[str, Any]:
    """Figures of the plain llama; `options` are those of `benchmarks.model`."""

    def make(batch: int, room: int) -> PlainLlama:
        return PlainLlama(
            options.shape, options.layers, int4=int4, head_int4=head_int4, batch=batch, room=room
        )

    with torch.device(options.device):
        result: dict[str, Any] = {
            "decode": {},
            "prefill": _prefill(make(1, max(options.prompts, default=1)), options),
        }
        for batch in options.peer_batches:
            # A cache no longer than is used: this model reads all of it.
            room = -(-(options.decode_prompt + options.decode_tokens + 1) // 64) * 64
            speed = _decode(make(batch, room), batch, options)
            result["decode"][str(batch)] = {"tokens_per_second": speed}
            torch._dynamo.reset()
    return result


@torch.no_grad()
def _prefill(model: PlainLlama, options: Any) -> dict[str, Any]:
    """Seconds of a whole prompt, eager."""
    rows = {}
    for tokens in options.prompts:
        ids, at = torch.randint(0, 500, (1, tokens)), torch.arange(tokens)
        took = seconds(lambda ids=ids, at=at: model(ids, at, whole=True), options.repeats)
        rows[str(tokens)] = {"seconds": took, "tokens_per_second": tokens / took}
    return rows


@torch.no_grad()
def _decode(model: PlainLlama, batch: int, options: Any) -> float:
    """Tokens per second, the next token chosen on the GPU and read by nobody in between."""
    torch._inductor.config.coordinate_descent_tuning = options.peer_autotune
    prompt = torch.randint(0, 500, (batch, options.decode_prompt))
    model(prompt, torch.arange(options.decode_prompt), whole=True)

    def one(token: Tensor, at: Tensor) -> Tensor:
        return model(token, at, whole=False)[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(one, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def run() -> Tensor:
        token = prompt[:, -1:]
        at = torch.tensor([options.decode_prompt])
        for _ in range(options.decode_tokens):
            with sdpa_kernel(SDPBackend.MATH):  # inductor writes this one itself
                token = step(token, at).clone()
            at += 1
        return token

    return batch * options.decode_tokens / seconds(run, options.repeats)


@torch.no_grad()
def transformers_nf4(options: Any) -> dict[str, Any]:
    """The llama of transformers, its linears but the head from bitsandbytes, eager."""
    import bitsandbytes as bnb
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SHAPES[options.shape])
    sizes["num_hidden_layers"] = options.layers or sizes["num_hidden_layers"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        made = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = torch.empty(module.weight.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(options.device)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            made = torch.empty(parameter.shape, dtype=torch.bfloat16)
            made = made.fill_(1) if parameter.dim() == 1 else made.normal_(0, 0.02)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Parameter(made, requires_grad=False))
    # Rotary frequencies are computed, not stored: made anew where the model now lives.
    with torch.device(options.device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

    def generate(batch: int, prompt: int, count: int) -> Any:
        ids = torch.randint(3, 500, (batch, prompt), device=options.device)
        mask = torch.ones_like(ids)
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0,
        )  # fmt: skip

    result: dict[str, Any] = {"decode": {}, "prefill": {}}
    for tokens in options.prompts:
        took = seconds(lambda tokens=tokens: generate(1, tokens, 1), options.repeats)
        result["prefill"][str(tokens)] = {"seconds": took, "tokens_per_second": tokens / took}
    for batch in options.peer_batches:
        first, count = (
            seconds(lambda n=n, batch=batch: generate(batch, options.decode_prompt, n), 1)
            for n in (1, options.decode_tokens + 1)
        )
        result["decode"][str(batch)] = {"tokens_per_second": batch * options.decode_tokens / (count - first)}
    return result


PEERS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "plain-bf16": ("plain llama, torch.compile: bf16", lambda o: plain_llama(o, int4=False)),
    "plain-int4": ("plain llama, torch.compile: tinygemm 4 bit", lambda o: plain_llama(o, int4=True)),
    "plain-int4-head": (
        "plain llama, torch.compile: tinygemm 4 bit, head too",
        lambda o: plain_llama(o, int4=True, head_int4=True),
    ),
}
if importlib.util.find_spec("bitsandbytes") is not None:
    PEERS["transformers-nf4"] = ("transformers, bitsandbytes: nf4", transformers_nf4)
