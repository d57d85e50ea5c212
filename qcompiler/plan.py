"""The plan of a compilation: the graph, canonical and quantized, on meta; no weight has been read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import GraphModule, Node

from qcompiler.capture import CapturedModel, ModelSource, capture
from qcompiler.checkpoint import Checkpoint
from qcompiler.checkpoint.files import read_json
from qcompiler.emit.targets import ONNX, check_plan, settle_options
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import EmbeddingFormat, get_format
from qcompiler.layer_plan import LayerPlan
from qcompiler.methods.base import get_method
from qcompiler.options import CompileOptions
from qcompiler.passes import (
    Pass,
    PassManager,
    QuantizedLinear,
    QuantizeEmbeddings,
    QuantizeLinears,
    canonical_passes,
)
from qcompiler.passes.graph_utils import is_parameter
from qcompiler.passes.quantize_linears import linear_like, linear_name
from qcompiler.passes.weights import layer_name, recipe_of, resolve
from qcompiler.report import SkippedLayer

if TYPE_CHECKING:
    from qcompiler.methods.base import Method
    from qcompiler.passes import PassResult, QuantizeResult

# Copied from the checkpoint as they are; the runtime needs the first, the rest is for other tools.
CARRIED_FILES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "config.json",
)  # fmt: skip


@dataclass
class CompilePlan:
    """Everything that is known before the first weight is read.

    Attributes:
        options: What was asked for.
        source: The model and its checkpoint.
        captured: The model as captured; its graph is canonical and still float.
        quantized_graph: A copy of it with the chosen linears in their storage formats, on meta.
        layers: The weights to quantize in graph order: linears, experts and embeddings.
        skipped: The others, and why.
        method: The quantization method.
        method_options: Its options, defaults filled in.
        device: Where weights are quantized and quality is measured.
        passes: What each pass did.
        embedding_method: The method of embeddings; that of the linears where its format can be gathered.
    """

    options: CompileOptions
    source: ModelSource
    captured: CapturedModel
    quantized_graph: GraphModule
    layers: list[QuantizedLinear]
    skipped: list[SkippedLayer]
    method: Method
    method_options: dict[str, Any]
    device: torch.device
    passes: list[PassResult] = field(default_factory=list)
    embedding_method: Method | None = None

    @property
    def linears(self) -> list[QuantizedLinear]:
        """The layers that are linears or experts."""
        return [layer for layer in self.layers if layer.kind != "embedding"]

    @property
    def embeddings(self) -> list[QuantizedLinear]:
        """The layers that are embedding tables."""
        return [layer for layer in self.layers if layer.kind == "embedding"]

    @property
    def linears_quantized(self) -> int:
        """Linears that run on stored codes, those tied to an embedding too."""
        return len(self.linears) + sum(len(layer.shared_with) for layer in self.embeddings)

    def method_of(self, layer: QuantizedLinear) -> tuple[Method, dict[str, Any]]:
        """The method that quantizes a layer, and its options."""
        if layer.kind == "embedding" and self.embedding_method not in (None, self.method):
            # Round to nearest in place of a method whose format has no gather.
            return self.embedding_method, {"zeros": "integer"} if ONNX in self.options.emit else {}
        return self.method, self.method_options

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights; a plan is always made from a model that has some."""
        if self.source.checkpoint is None:
            raise InvalidInputError(f"{self.source.name} has no weights to compile")
        return self.source.checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """Activation dtype of the artifact."""
        return self.captured.dtype

    def file(self, name: str) -> Path | None:
        """A file of the checkpoint's folder, or None if it has none of that name."""
        path = self.checkpoint.folder / name
        return path if path.is_file() else None

    def carried_files(self) -> dict[str, Path]:
        """Tokenizer and configs that go into the artifact as they are, by file name."""
        found = {name: self.file(name) for name in CARRIED_FILES}
        return {name: path for name, path in found.items() if path is not None}

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, empty if there is none."""
        path = self.file("generation_config.json")
        return {} if path is None else read_json(path)


def make_plan(
    options: CompileOptions, *, opened: Callable[[ModelSource], None] = lambda _source: None
) -> CompilePlan:
    """Capture the model and decide what happens to each linear.

    Reads shapes; weights only where an option is to be chosen by them.

    Args:
        options: What to compile, and how.
        opened: Told of the checkpoint before the capture, which takes a while.

    Raises:
        InvalidInputError: An option does not fit the method, the model or the machine.
        UnsupportedModelError: The model cannot be captured faithfully.
    """
    method = pick_method(options)
    options = settle_options(options, method)
    method_options = method.validate(options.method_options)
    method.resolve_spec(options.bits, options.group_size, method_options)  # refuses impossible widths now
    device = pick_device(options.device)
    source = ModelSource.from_pretrained(
        options.model, trust_remote_code=options.trust_remote_code, revision=options.revision
    )
    opened(source)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    captured = capture(source, dtype, max_context=options.max_context)
    passes = PassManager(canonical_passes(), dump_dir=_dump(options, "1-canonical")).run(captured.graph)
    return plan_layers(
        CompilePlan(
            options, source, captured, captured.graph, [], [], method, method_options, device, list(passes)
        )
    )


def plan_layers(plan: CompilePlan, formats: Mapping[str, Any] | None = None) -> CompilePlan:
    """The plan with what happens to each linear decided anew.

    Args:
        plan: A plan; of it the captured model, the method and what the canonical passes did are kept.
        formats: Layer → spec, for layers whose format an allocation has decided.

    Raises:
        InvalidInputError: A pattern of the user matches no linear, or nothing would be quantized.
    """
    options, captured, method, method_options = plan.options, plan.captured, plan.method, plan.method_options
    formats = formats or {}
    layer_plan = LayerPlan(options, head_names=output_heads(captured.graph))
    method_options = method.settle(
        options.bits, options.group_size, method_options, lambda: sample_weights(plan.source, captured.graph)
    )
    experts = expert_names(captured.graph)

    def choose(name: str, out_features: int, in_features: int) -> Any:
        bits = layer_plan.bits_for(name) if method.quantizes else f"--method {method.name}"
        if isinstance(bits, str):
            return bits
        if name in formats:
            return formats[name]
        chosen = method.plain(method_options) if name in experts else method_options
        return method.resolve_spec(bits, options.group_size, chosen)

    quantized_graph = copy.deepcopy(captured.graph)
    embedding_method = pick_embedding_method(method) if options.embedding_bits else None
    quantize = QuantizeLinears(choose)
    quantize.required = False  # told below in the user's terms
    quantizing: list[Pass] = [quantize]
    if embedding_method is not None:
        quantizing[0].required = False  # all linears may be left alone where the embedding is not
        quantizing.insert(0, quantize_embeddings(options, layer_plan, embedding_method))
    results = PassManager(quantizing, dump_dir=_dump(options, "2-quantized")).run(quantized_graph)
    skipped = [SkippedLayer(name, reason) for name, reason in results[-1].skipped]
    layers = [layer for result in results for layer in cast("QuantizeResult", result).quantized]
    shared = [name for layer in layers for name in layer.shared_with]
    layer_plan.check_all_used([layer.name for layer in layers] + [layer.name for layer in skipped] + shared)
    if method.quantizes and not layers:
        reasons = ", ".join(sorted({layer.reason for layer in skipped})) or "the graph has no linear"
        raise InvalidInputError(
            f"{options.model}: nothing would be quantized ({reasons})",
            hint="Compile it as it is with --method none.",
        )
    plan = replace(
        plan,
        method_options=method_options,
        quantized_graph=quantized_graph,
        layers=layers,
        skipped=skipped,
        passes=[*plan.passes[: len(canonical_passes())], *results],
        embedding_method=embedding_method,
    )
    check_plan(plan)
    return plan


def pick_method(options: CompileOptions) -> Method:
    """The method of the options; what `auto` stands for depends on whether it may look at text."""
    if options.method == "auto":
        from qcompiler.allocation.method import auto_method

        return auto_method(calibrated=options.sensitivity == "output")
    return get_method(options.method)


def expert_names(gm: GraphModule) -> frozenset[str]:
    """Names of the layers that are expert weights of grouped linears."""
    grouped = torch.ops.qcompiler.grouped_linear.default
    nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is grouped]
    return frozenset(layer_name(str(node.args[1].target)) for node in nodes if is_parameter(node.args[1]))


def sample_weights(source: ModelSource, gm: GraphModule, most: int = 6, rows: int = 32) -> list[torch.Tensor]:
    """Rows of some of the linears of a canonical graph, evenly spread, from the checkpoint.

    Raises:
        InvalidInputError: The model has no weights, or no linear.
    """
    if source.checkpoint is None:
        raise InvalidInputError(f"{source.name} has no weights to choose by")
    nodes = [node for node in gm.graph.nodes if linear_like(node) and is_parameter(node.args[1])]
    heads = output_heads(gm)
    names = [str(node.args[1].target) for node in nodes if linear_name(node) not in heads]
    if not names:
        raise InvalidInputError(f"{source.name} has no linear to choose by")
    samples = []
    for name in names[:: -(-len(names) // most)]:
        weight = resolve(recipe_of(gm, name), source.checkpoint.tensor)
        samples.append(weight[:: -(-weight.shape[0] // rows)].float())
    return samples


def pick_embedding_method(method: Method) -> Method:
    """The method itself if its format can be gathered from, else round to nearest."""
    return method if isinstance(get_format(method.format_name), EmbeddingFormat) else get_method("rtn")


def quantize_embeddings(options: CompileOptions, layer_plan: LayerPlan, method: Method) -> QuantizeEmbeddings:
    """The pass for `--embedding-bits`."""

    def choose(name: str, rows: int, columns: int) -> Any:
        bits = layer_plan.embedding_bits_for(name)
        if isinstance(bits, str):
            return bits
        if method.name != options.method:
            return method.resolve_spec(bits)
        return method.resolve_spec(bits, options.group_size, method.plain(options.method_options))

    return QuantizeEmbeddings(choose, share=layer_plan.shares_embedding)


def pick_device(name: str) -> torch.device:
    """The device that an option means.

    Raises:
        InvalidInputError: No such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInputError(
            f"device {name!r} is not known", hint="Use auto, cpu, cuda or cuda:N."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("device cuda was asked for, but torch sees no GPU", hint="Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(f"{name} does not exist: torch sees {torch.cuda.device_count()} GPU(s)")
    if device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device {name!r} is not supported", hint="Use auto, cpu, cuda or cuda:N.")
    return device


def output_heads(gm: GraphModule) -> frozenset[str]:
    """Names of the linears whose result reaches the output through one-input ops only (soft cap, scale)."""
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    heads: set[str] = set()
    frontier: list[Node] = list(output.all_input_nodes)
    while frontier:
        node = frontier.pop()
        if linear_like(node):
            heads.add(linear_name(node))
        elif node.op == "call_function" and len(tensor_inputs(node)) == 1:
            frontier.extend(tensor_inputs(node))
    return frozenset(heads)


def tensor_inputs(node: Node) -> list[Node]:
    """The inputs of a node that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _dump(options: CompileOptions, stage: str) -> Path | None:
    return None if options.dump_graphs is None else options.dump_graphs / stage
