"""`torch.compile(backend="qcompiler")`: numbers, graph breaks, weights made once, refusals."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from qcompiler.backend import Backend, forget
from qcompiler.backend.weights import WEIGHTS
from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError
from qcompiler.kernels.formats import get_format
from qcompiler.methods.base import get_method
from qcompiler.methods.rtn import RoundToNearest

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    WEIGHTS.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Block(nn.Module):
    def __init__(self, size: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up, self.gate = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def dequantized(model: nn.Module, method: str, bits: int, leave: tuple[str, ...] = ()) -> nn.Module:
    """The model with its linears' weights quantized and put back: what the backend must compute."""
    model, chosen = copy.deepcopy(model), get_method(method)
    spec = chosen.resolve_spec(bits)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in leave:
            tensors = chosen.quantize(layer.weight, spec)
            columns = layer.weight.shape[1]
            weight = get_format(spec.name).dequantize(spec, tensors, columns, layer.weight.dtype)
            layer.weight = nn.Parameter(weight)
    return model


def compiled(model, **options):
    backend = Backend(**{"method": "rtn", "bits": 8, "compiler": "eager", **options})
    return torch.compile(model, backend=backend, fullgraph=True), backend


def close(got, wanted, tolerance=2e-5):
    assert got.shape == wanted.shape
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < tolerance


@pytest.fixture
def quantizations(monkeypatch):
    """How often each weight was quantized, by its name."""
    count: Counter[str] = Counter()
    quantize = RoundToNearest.quantize

    def counted(self, weight, spec, options=None, *, name="weight"):
        count[name] += 1
        return quantize(self, weight, spec, options, name=name)

    monkeypatch.setattr(RoundToNearest, "quantize", counted)
    return count


def test_the_entry_point_is_declared():
    (entry,) = entry_points(group="torch_dynamo_backends", name="qcompiler")
    assert entry.value == "qcompiler.backend:qcompiler"
    assert "qcompiler" in torch._dynamo.list_backends()


@pytest.mark.parametrize(("method", "bits"), [("hqq", 4), ("rtn", 3), ("eetq", 8), ("bnb", 4)])
def test_a_module_computes_with_its_quantized_weights(method, bits):
    model = Block().eval()
    options = {"method": method, "bits": bits, "compiler": "eager"}
    run = torch.compile(model, backend="qcompiler", options=options, fullgraph=True)
    wanted = dequantized(model, method, bits)
    for rows in (3, 1, 7):
        x = torch.randn(2, rows, 64)
        close(run(x), wanted(x))
    assert not counters["graph_break"]


def test_fusions_stand_in_the_graph_or_are_left_to_the_compiler():
    model, x = Block().eval(), torch.randn(5, 64)
    run, backend = compiled(model)
    plain, unfused = compiled(model, fuse=False)
    close(run(x), plain(x))
    matched = {result.name: result.matched for result in backend.reports[0].passes}
    assert matched["quantize_linears"] == 3
    assert matched["fuse_gated_activation"] == 1
    assert matched["fuse_sibling_linears"] == 1
    assert "fuse_gated_activation" not in {result.name for result in unfused.reports[0].passes}


@pytest.mark.slow
def test_inductor_compiles_the_rest():
    model = Block(16).eval()
    run, _ = compiled(model, compiler="inductor")
    wanted = dequantized(model, "rtn", 8)
    for rows in (3, 5, 9):
        x = torch.randn(rows, 16)
        close(run(x), wanted(x))
    assert not counters["graph_break"]


def test_weights_are_quantized_once_across_recompiles(quantizations):
    model = Block().eval()
    run, backend = compiled(model)
    for rows in (3, 1, 7, 9):  # fixed, one, dynamic
        run(torch.randn(rows, 64))
    assert len(backend.reports) >= 2
    assert set(quantizations.values()) == {1}
    assert sorted(quantizations) == ["down", "gate", "up"]
    torch._dynamo.reset()
    compiled(model)[0](torch.randn(3, 64))
    assert set(quantizations.values()) == {1}


def test_one_graph_serves_layers_with_weights_of_their_own(quantizations):
    layers = nn.ModuleList(Block() for _ in range(3)).eval()
    wanted = [dequantized(layer, "rtn", 8) for layer in layers]
    quantizations.clear()
    backend = Backend(method="rtn", bits=8, compiler="eager")
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    x = torch.randn(4, 64)
    for _ in range(2):
        for layer, alone in zip(layers, wanted, strict=True):
            close(layer(x), alone(x))
    assert len(backend.reports) == 1
    assert quantizations.total() == 9


def test_changed_and_replaced_weights_are_quantized_anew():
    model, x = Block().eval(), torch.randn(4, 64)
    run, _ = compiled(model)
    run(x)
    model.down.weight.mul_(2)
    close(run(x), dequantized(model, "rtn", 8)(x))
    model.up.weight = nn.Parameter(torch.randn(128, 64))
    model.norm.weight.add_(1)
    close(run(x), dequantized(model, "rtn", 8)(x))


def test_a_write_that_torch_does_not_count_needs_a_word():
    model, x = Block().eval(), torch.randn(4, 64)
    run, _ = compiled(model)
    run(x)
    model.down.weight.data = model.down.weight.data * 2  # other memory: seen
    close(run(x), dequantized(model, "rtn", 8)(x))
    model.down.weight.data.mul_(2)
    forget()
    close(run(x), dequantized(model, "rtn", 8)(x))


def test_two_widths_of_one_model_do_not_mix():
    model, x = Block().eval(), torch.randn(4, 64)
    for bits in (8, 3, 8):
        close(compiled(model, bits=bits)[0](x), dequantized(model, "rtn", bits)(x))


def test_tensors_that_the_code_writes_out_stay_its_own():
    layer, x = nn.Linear(64, 2).eval(), torch.randn(3, 64)
    wanted = dequantized(nn.Sequential(layer), "rtn", 8)(x)
    for shift in ([1.0, 2.0], [30.0, 40.0]):
        run = torch.compile(
            lambda x, shift=shift: layer(x) + torch.tensor(shift),
            backend=Backend(method="rtn", bits=8, compiler="eager"),
        )
        close(run(x), wanted + torch.tensor(shift))


def test_stored_tensors_go_with_the_parameters():
    model = Block().eval()
    run, _ = compiled(model)
    run(torch.randn(4, 64))
    assert len(WEIGHTS)
    del run, model
    torch._dynamo.reset()
    gc.collect()
    assert len(WEIGHTS) == 0


def test_the_weights_of_two_graphs_around_a_break():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model, x = Broken().eval(), torch.randn(4, 64)
    backend = Backend(method="rtn", bits=8, compiler="eager")
    close(torch.compile(model, backend=backend)(x), dequantized(model, "rtn", 8)(x))
    assert [report.quantized for report in backend.reports] == [["a"], ["b"]]


def test_names_to_skip_are_those_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))
            self.lm_head = nn.Linear(64, 32)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(x)

    model, x = Model().eval(), torch.randn(4, 64)
    run, backend = compiled(model, skip=["lm_head", "layers.1.*"])
    close(
        run(x), dequantized(model, "rtn", 8, ("lm_head", "layers.1.up", "layers.1.gate", "layers.1.down"))(x)
    )
    (report,) = backend.reports
    assert sorted(report.quantized) == ["layers.0.down", "layers.0.gate", "layers.0.up"]
    assert ("lm_head", "skip lm_head") in report.skipped


def test_tiny_llama_through_transformers():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    backend = Backend(method="rtn", bits=8, compiler="eager")
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    wanted = dequantized(model, "rtn", 8, ("lm_head",))
    for tokens in (9, 17):
        ids = torch.randint(5, 2000, (2, tokens))
        close(run(ids, use_cache=False).logits, wanted(ids, use_cache=False).logits)
    assert len(backend.reports) == 1
    assert not counters["graph_break"]
    (report,) = backend.reports
    assert len(report.quantized) == 28
    assert report.skipped == [("model.embed_tokens", "tied to an embedding")]
    matched = {result.name: result.matched for result in report.passes}
    assert (matched["fuse_rms_norm"], matched["fuse_rotary"], matched["fuse_add_norm"]) == (9, 8, 8)


def test_a_decoder_with_the_cache_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).eval()
    run, _ = compiled(model)
    wanted = dequantized(model, "rtn", 8, ("lm_head",))
    ids = torch.randint(5, 96, (2, 7))
    cache = run(ids[:, :6]).past_key_values
    step = run(ids[:, 6:], past_key_values=cache).logits
    close(step[:, -1], wanted(ids, use_cache=False).logits[:, -1])
    assert not counters["graph_break"]


def test_a_float_that_shapes_the_graph_is_guarded():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = 0.5, nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(x) * self.scale

    model, x = Scale().eval(), torch.randn(3, 64)
    backend = Backend(method="rtn", bits=8, compiler="eager")
    run = torch.compile(model, backend=backend, dynamic=True)
    for scale in (0.5, 3.0):
        model.scale = scale
        close(run(x), dequantized(model, "rtn", 8)(x))


def test_a_float_of_the_caller_may_vary():
    layer = nn.Linear(64, 64).eval()
    backend = Backend(method="rtn", bits=8, compiler="eager")
    run = torch.compile(lambda x, temperature: layer(x) / temperature, backend=backend, dynamic=True)
    x, wanted = torch.randn(3, 64), dequantized(nn.Sequential(layer), "rtn", 8)
    for temperature in (0.5, 0.7, 1.3, 2.0):
        close(run(x, temperature), wanted(x) / temperature)
    assert len(backend.reports) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metod": "hqq"}, "no option 'metod'"),
        ({"method": "nonsense"}, "no quantization method 'nonsense'"),
        ({"method": "gptq"}, "calibrates on text"),
        ({"bits": "4"}, "takes int or None"),
        ({"bits": True}, "takes int or None"),
        ({"bits": 7}, "no 7-bit weights"),
        ({"group_size": 33}, "33"),
        ({"compiler": "tvm"}, "cannot be 'tvm'"),
        ({"method_options": {"solver": "magic"}}, "cannot be 'magic'"),
        ({"compiler": "eager", "inductor": {"max_autotune": True}}, "mean nothing"),
    ],
)
def test_bad_options_are_refused_with_their_name(options, words):
    with pytest.raises(InvalidInputError, match=words):
        Backend(**options)


def test_a_refusal_reaches_the_user_of_torch_compile():
    run = torch.compile(nn.Linear(8, 8), backend="qcompiler", options={"bit": 4})
    with pytest.raises(BackendCompilerFailed, match="Did you mean 'bits'") as caught:
        run(torch.randn(2, 8))
    assert isinstance(caught.value.inner_exception, InvalidInputError)


def test_training_and_autocast_are_refused():
    model = Block().eval()
    run, _ = compiled(model)
    with torch.enable_grad(), pytest.raises(BackendCompilerFailed, match="wants a gradient") as caught:
        run(torch.randn(3, 64, requires_grad=True))
    assert isinstance(caught.value.inner_exception, InvalidInputError)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(BackendCompilerFailed, match="autocast") as caught,
    ):
        compiled(model)[0](torch.randn(3, 64))
    assert isinstance(caught.value.inner_exception, UnsupportedModelError)


def test_a_weight_that_cannot_be_quantized_is_named():
    model = Block().eval()
    model.down.weight[0, 0] = torch.nan
    with pytest.raises(BackendCompilerFailed, match="down") as caught:
        compiled(model)[0](torch.randn(3, 64))
    assert isinstance(caught.value.inner_exception, InvalidInputError)


def test_bfloat16_takes_the_packed_kernel_of_the_cpu():
    model = Block().eval().to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    run, backend = compiled(model, bits=4)
    close(run(x).float(), dequantized(model, "rtn", 4)(x).float(), 4e-2)
    assert len(backend.reports[0].quantized) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("method", "bits"), [("hqq", 4), ("bnb", 4), ("eetq", 8)])
def test_on_a_gpu_through_inductor_with_and_without_cuda_graphs(method, bits, mode):
    model = Block(256).eval().to("cuda", torch.bfloat16)
    run, backend = compiled(model, method=method, bits=bits, compiler="inductor", mode=mode)
    wanted = dequantized(model, method, bits)
    for rows in (4, 1, 33):
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
        for _ in range(4):  # warm-up, capture, replays
            got = run(x).clone()
            close(got.float(), wanted(x).float(), 3e-2)
    model.down.weight.mul_(2)
    close(run(x).float(), dequantized(model, method, bits)(x).float(), 3e-2)
    assert not counters["graph_break"]
    assert len(backend.reports[0].quantized) == 3
