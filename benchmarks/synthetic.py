"""A compiled model without checkpoint or disk: the compiler's own road, weights made on the device.

The graph is captured, quantized and lowered as `qcompile` does it, and loaded as an artifact is; only the
weights come from here. A weight of each shape is made once and copied for every layer, so that layers lie
apart in memory as real ones do. What a method would decide is not of interest, speed is the format's: affine
codes are rounded to nearest whoever would choose them, and codes of additive codebooks are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from benchmarks.checkpoint import SHAPES, write_tokenizer
from qcompiler.calibration.runner import MemoryStore
from qcompiler.capture import CapturedModel, ModelSource, capture
from qcompiler.emit.graph_json import graph_to_json
from qcompiler.kernels.formats import ADDITIVE, AdditiveSpec
from qcompiler.methods.base import get_method
from qcompiler.options import CompileOptions
from qcompiler.passes import PassManager, QuantizedLinear, canonical_passes, lowering_passes
from qcompiler.passes.weights import Quantized, weight_of
from qcompiler.plan import CompilePlan, plan_layers
from qcompiler.quantize_weights import WeightStream, captured_constant
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.graph import decode
from qcompiler.runtime.manifest import FileEntry, GpuRequirement, Manifest, ModelInfo

_SPREAD = 0.02  # standard deviation of weights, as models are initialised


@dataclass(frozen=True)
class Variant:
    """One row's model.

    Attributes:
        label: As the table says it.
        method: Whose format it is.
        bits: Bits per code.
        options: The method's options.
        note: What is to be known of its weights.
    """

    label: str
    method: str = "rtn"
    bits: int = 4
    options: tuple[tuple[str, Any], ...] = ()
    note: str = ""


_NEAREST = "codes rounded to nearest"
VARIANTS = {
    "bf16": Variant("bf16", "none", 16),
    **{
        f"affine-{bits}": Variant(f"hqq, rtn: {bits} bit, g64", "rtn", bits, note=_NEAREST)
        for bits in (2, 3, 4, 5, 6, 8)
    },
    "nf4": Variant("bnb: nf4", "bnb", 4),
    "fp4": Variant("bnb: fp4", "bnb", 4, (("quant_type", "fp4"),)),
    "llm-int8": Variant("bnb: LLM.int8()", "bnb", 8, note="random weights make few outliers"),
    "eetq": Variant("eetq: 8 bit", "eetq", 8),
    "aqlm-2x8": Variant("aqlm: 2x8", "aqlm", 2, (("scheme", "2x8"),), "codes random"),
    "aqlm-1x16": Variant("aqlm: 1x16", "aqlm", 2, (("scheme", "1x16"),), "codes random"),
    "tail-3": Variant("hqq: 3 bit, g64, tail 0.5 %", "hqq", 3, (("tail_fraction", "0.005"),)),
    "tail-2": Variant("hqq: 2 bit, g64, tail 0.5 %", "hqq", 2, (("tail_fraction", "0.005"),)),
}  # fmt: skip


def captured_llama(shape: str, layers: int | None = None) -> tuple[ModelSource, CapturedModel]:
    """The canonical graph of a llama of that shape, in bfloat16; `layers` instead of all."""
    from transformers import LlamaConfig

    sizes = dict(SHAPES[shape])
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    source = ModelSource.from_config(config, shape)
    captured = capture(source, torch.bfloat16)
    PassManager(canonical_passes()).run(captured.graph)
    return source, captured


class _Weights(WeightStream):
    """Tensors of a plan that has no checkpoint."""

    def __init__(self, plan: CompilePlan):
        super().__init__(plan, MemoryStore())
        self.plan = plan
        self._by_name = {layer.name: layer for layer in plan.layers}
        self._by_shape: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}
        self._generator = torch.Generator(plan.device).manual_seed(0)

    def _load_tuned(self, name: str) -> torch.Tensor:
        value = captured_constant(self.plan, name)
        if value is not None:
            return value
        wanted = weight_of(self.plan.captured.graph, name)
        if wanted.dim() == 1:
            return torch.ones(wanted.shape, dtype=self.plan.dtype, device=self.plan.device)
        return self._random(tuple(wanted.shape))

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape, dtype=self.plan.dtype, device=self.plan.device)
        return made.normal_(0, _SPREAD, generator=self._generator)

    def _parts(self, recipe: Quantized) -> dict[str, torch.Tensor]:
        layer = self._by_name[recipe.name]
        key = (layer.spec, layer.out_features, layer.in_features)
        if key not in self._by_shape:
            self._by_shape[key] = self._stored(layer)
        # A part that several layers hold must be memory of its own in each.
        return {recipe.part: self._by_shape[key][recipe.part].clone()}

    def forget(self) -> None:
        """Drop what is kept to copy from."""
        self._by_shape.clear()

    def _stored(self, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        rows, columns, spec = layer.out_features, layer.in_features, layer.spec
        if isinstance(spec, AdditiveSpec):
            device, generator = self.plan.device, self._generator
            shape = (rows, columns // spec.group_size, spec.codebooks)
            codes = torch.randint(0, spec.codewords, shape, device=device, generator=generator)
            books = torch.randn(
                spec.codebooks, spec.codewords, spec.group_size, device=device, generator=generator
            )
            scales = torch.full((rows,), _SPREAD * spec.codebooks**-0.5, device=device)
            return ADDITIVE.pack(spec, codes, books, scales)
        method, options = self.plan.method_of(layer)
        return method.quantize(self._random((rows, columns)), spec, options, name=layer.name)


class SyntheticArtifact(Artifact):
    """An artifact that was never written; `qcompiler.runtime.model.load_opened` takes it.

    Args:
        source: The model.
        captured: Its canonical graph, which is not changed.
        variant: How it is quantized.
        device: Where weights are made.
        lm_head_bits: Of the output head; None leaves it in bfloat16.
        kv_bits: Of the KV cache.
        folder: Where a tokenizer of as many words is written, for what speaks text; None: it has none.
    """

    def __init__(
        self, source: ModelSource, captured: CapturedModel, variant: Variant, device: torch.device,
        *, lm_head_bits: int | None = None, kv_bits: str = "16", folder: Path | None = None,
    ):  # fmt: skip
        method = get_method(variant.method)
        options = CompileOptions(
            source.name, variant.method, variant.bits, lm_head_bits=lm_head_bits, kv_bits=kv_bits,
            method_options=dict(variant.options), eval_tokens=0,
        )  # fmt: skip
        graph = captured.graph
        settled = method.validate(options.method_options)
        plan = plan_layers(CompilePlan(options, source, captured, graph, [], [], method, settled, device))
        self._lowered: GraphModule = plan.quantized_graph
        PassManager(lowering_passes(captured.kind, kv_format=options.kv_format)).run(self._lowered)
        self._weights = _Weights(plan)
        self.bits_per_weight = {layer.name: layer.bits_per_weight for layer in plan.layers}
        self.root = Path(source.name) if folder is None else folder
        files = {}
        if folder is not None:
            write_tokenizer(folder, captured.vocab_size)
            files = {path.name: FileEntry(path.stat().st_size, "") for path in folder.iterdir()}
        self.graph = decode(graph_to_json(self._lowered, kind=captured.kind))
        info = ModelInfo("llama", captured.vocab_size, captured.max_positions or 1 << 20)
        self.manifest = Manifest(captured.kind, "bfloat16", info, files, [], {}, GpuRequirement(), {})
        self.tensors = _Closing(self._weights)  # type: ignore[assignment]

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """One tensor, made now."""
        return self._weights.tensor(self._lowered, name).to(device)


class _Closing:
    """Stands where the files would: once the program is loaded, what weights were copied from may go."""

    def __init__(self, weights: _Weights):
        self._weights = weights

    def close(self) -> None:
        """Let go of it."""
        self._weights.forget()
