"""`qcompiler.quantize`: any module with its linears replaced, without an artifact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.methods.base import get_method
from qcompiler.stored_linear import StoredLinear

WAYS = [
    ("hqq", 4, {}), ("hqq", 3, {}), ("rtn", 8, {}), ("eetq", 8, {}), ("bnb", 8, {}),
    ("bnb", 4, {}), ("bnb", 4, {"quant_type": "fp4", "double_quant": False}),
]  # fmt: skip


class Net(nn.Module):
    """Two linears (one without a bias), a norm, and an attention whose own linear must stay as it is."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(self, x):
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def with_restored_weights(net, quantized):
    """The float module with the weights that the codes stand for: what the quantized one must compute."""
    restored = copy.deepcopy(net)
    for name, module in quantized.named_modules():
        if isinstance(module, StoredLinear):
            restored.get_submodule(name).weight.data = module.weight
    return restored


@pytest.mark.parametrize(("method", "bits", "options"), WAYS)
@torch.no_grad()
def test_it_computes_with_the_weights_that_the_method_stores(net, x, method, bits, options):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantized = qcompiler.quantize(net, method=method, bits=bits, options=options)
    chosen = get_method(method)
    spec = chosen.resolve_spec(bits, None, chosen.validate(options))
    tensors = chosen.quantize(net.up.weight, spec, chosen.validate(options))
    assert all(torch.equal(value, getattr(quantized.up, part)) for part, value in tensors.items())
    weight = get_format(spec.name).dequantize(spec, tensors, 64, torch.float32)
    assert torch.equal(quantized.up.weight, weight)
    expected = with_restored_weights(net, quantized)(x)
    # LLM.int8() rounds activations to 8 bits as well; all else differs by the order of fp32 sums.
    tolerance = 2e-2 if (method, bits) == ("bnb", 8) else 1e-5
    assert (quantized(x) - expected).norm() < tolerance * expected.norm()
    assert type(quantized.attention.out_proj) is type(net.attention.out_proj)
    assert isinstance(net.up, nn.Linear)  # the module given stays as it was
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("method", "bits", "options"), WAYS)
@torch.no_grad()
def test_it_exports_and_the_graph_holds_the_formats_op(net, x, method, bits, options):
    quantized = qcompiler.quantize(net, method=method, bits=bits, options=options)
    quantized(x)  # a provider's tensors must not find their way into the graph
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(quantized, (x,), dynamic_shapes=({0: rows},), strict=False)
    ours = [n.target for n in program.graph.nodes if str(n.target).startswith("qcompiler.linear_")]
    assert len(ours) == 2
    assert set(program.state_dict) == set(quantized.state_dict())
    longer = torch.cat([x, x, x])
    assert torch.allclose(program.module()(longer), quantized(longer), atol=1e-5)


@torch.no_grad()
def test_torch_compile_takes_it(net, x):
    quantized = qcompiler.quantize(net.up, bits=4)
    compiled = torch.compile(quantized, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), quantized(x), atol=1e-5)


@torch.no_grad()
def test_bfloat16_on_a_cpu_runs_torchs_int4_kernel(net, x):
    quantized = qcompiler.quantize(nn.Sequential(net.up), bits=4, dtype="bfloat16")
    assert quantized[0].bias.dtype == torch.bfloat16
    assert net.up.bias.dtype == torch.float32
    row = x[0, :1].bfloat16()
    y = quantized(row)
    assert quantized[0]._prepared.provider.name == "cpu-int4"
    expected = nn.functional.linear(row.float(), quantized[0].weight.float(), net.up.bias)
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_state_dict_round_trip_also_after_a_first_run(net, x):
    torch.manual_seed(5)
    other = Net().eval()
    one, two = (qcompiler.quantize(module, bits=4) for module in (net, other))
    before = two(x)  # prepares the other's weights, which loading must make stale
    two.load_state_dict(one.state_dict())
    assert not torch.equal(two(x), before)
    assert torch.equal(two(x), one(x))
    # A copy of a module that has run prepares its own.
    assert torch.equal(copy.deepcopy(one)(x), one(x))


@torch.no_grad()
def test_casting_the_module_leaves_what_is_stored(net, x):
    quantized = qcompiler.quantize(net, method="eetq")
    codes, scales = quantized.up.codes, quantized.up.scales
    quantized(x)
    quantized.half()
    assert quantized.up.codes is codes
    assert torch.equal(quantized.up.scales, scales)
    assert scales.dtype == torch.float32
    assert quantized.up.bias.dtype == quantized.up.weight.dtype == torch.float16
    y, expected = quantized.up(x.half()), net.up(x)
    assert y.dtype == torch.float16
    assert (y - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_a_module_on_meta_is_filled_from_a_state_dict(net, x):
    with torch.device("meta"):
        empty = Net().eval()
    filled = qcompiler.quantize(empty, bits=4)
    assert filled.up.low.is_meta
    source = qcompiler.quantize(net, bits=4)
    filled.load_state_dict(source.state_dict(), assign=True)
    filled.angles = net.angles
    assert torch.equal(filled(x), source(x))


def test_skip_overrides_and_inplace(net):
    quantized = qcompiler.quantize(net, bits=4, skip=["down"], bits_overrides={"u*": 8})
    assert quantized.up.spec.bits == 8
    assert torch.equal(quantized.down.weight, net.down.weight)
    assert quantized.down.weight is not net.down.weight
    assert qcompiler.quantize(net, bits=2, inplace=True, group_size=32) is net
    assert net.up.spec.group_size == 32


def test_dtype_moves_what_a_checkpoint_holds_and_leaves_the_rest(net):
    quantized = qcompiler.quantize(net, bits=4, dtype=torch.float16)
    assert quantized.norm.weight.dtype == quantized.up.weight.dtype == torch.float16
    assert quantized.up.scales.dtype == torch.float16
    assert quantized.angles.dtype == torch.float32
    assert net.norm.weight.dtype == torch.float32


@torch.no_grad()
def test_tied_linears_share_their_codes_and_a_tied_embedding_keeps_its_table():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(48, 64)
            self.a = nn.Linear(64, 64)
            self.b = nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.again = self.a
            self.head = nn.Linear(64, 48, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.again(self.b(self.a(self.table(ids)))))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(7)
    quantized = qcompiler.quantize(model, method="rtn", bits=8)
    assert quantized.a.low is quantized.b.low
    assert quantized.a.bias is not quantized.b.bias
    assert quantized.again is quantized.a
    assert quantized.head.weight is quantized.table.weight
    assert (quantized(ids) - model(ids)).norm() < 0.02 * model(ids).norm()
    with_head = qcompiler.quantize(model, method="rtn", bits=4, lm_head_bits=8)
    assert with_head.head.spec.bits == 8
    assert torch.equal(with_head.table.weight, model.table.weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_models_run_generate_and_export(kind):
    from transformers import CONFIG_MAPPING as CONFIGS
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    sizes |= {"gpt2": {"n_positions": 64}, "llama": {"num_key_value_heads": 2, "intermediate_size": 96}}[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes)).eval()
    quantized = qcompiler.quantize(model, method="hqq", bits=8)
    count = sum(isinstance(module, StoredLinear) for module in quantized.modules())
    assert count == {"gpt2": 8, "llama": 14}[kind]
    assert not isinstance(quantized.lm_head, StoredLinear)
    ids = torch.arange(12)[None]
    before, after = model(ids).logits, quantized(ids).logits
    assert (after - before).norm() < 0.02 * before.norm()
    assert quantized.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    program = torch.export.export(quantized, (ids,), {"use_cache": False}, strict=False)
    assert torch.allclose(program.module()(ids, use_cache=False).logits, after, atol=1e-4)


def test_what_cannot_be_done_is_said_by_name(net):
    cases = [
        (("a/folder",), {}, "qcompile"),
        ((net,), {"method": "gptq"}, "calibrates"),
        ((net,), {"method": "none"}, "does not quantize"),
        ((net,), {"method": "magic"}, "no quantization method"),
        ((net,), {"bits": 7}, "7-bit"),
        ((net,), {"skip": ["dwn"]}, "'dwn' matches no linear"),
        ((net,), {"skip": ["*"]}, "all left alone"),
        ((nn.ReLU(),), {}, "no nn.Linear"),
        ((net,), {"dtype": "int4"}, "int4"),
        ((net,), {"options": {"solvr": "search"}}, "solvr"),
        ((nn.Sequential(nn.Linear(33, 4)),), {"method": "bnb"}, "0: .*33"),
    ]
    for arguments, keywords, told in cases:
        with pytest.raises(InvalidInputError, match=told):
            qcompiler.quantize(*arguments, **keywords)
    net.up.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="up: 1 of"):
        qcompiler.quantize(net, bits=4)
