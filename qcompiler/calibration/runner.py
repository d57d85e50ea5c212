"""Runs calibration text through a captured graph, one quantized block after the other.

Held at any time: the tensors of one block, and for every window of text the
values that cross the border between two blocks (as a rule one hidden state
[1, T, hidden]), once as the quantized prefix gives them and, where the method
aims at the original model's own stream, once more as the original gives them.
Values that do not depend on the text (rotary tables) are computed once, since
all windows are equally long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch.fx import GraphModule, Node

from qcompiler.calibration.blocks import Block, Linear, cut_blocks, run_nodes
from qcompiler.calibration.task import BlockQuantizer, BlockResult, BlockTask
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import get_format
from qcompiler.passes.weights import recipe_of, resolve
from qcompiler.progress import Progress

Choose = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class CalibrationSettings:
    """How the text is run.

    Attributes:
        context: Tokens per window.
        tokens: Tokens used at most; whole windows only.
        follow_original: Keep the original model's stream beside the quantized one, and aim at it; doubles
            the memory of the streams. Otherwise a block's target is its own float output on the
            quantized prefix.
        stream_dtype: How the values between blocks are kept.
        seed: For every random choice of a method.
    """

    context: int = 512
    tokens: int = 65536
    follow_original: bool = True
    stream_dtype: torch.dtype = torch.float32
    seed: int = 0

    def windows(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """The text as int64 [1, context] windows, evenly spread over it.

        Raises:
            InvalidInputError: The text is shorter than one window.
        """
        available = len(tokens) // self.context
        count = min(available, max(1, self.tokens // self.context))
        if count == 0:
            raise InvalidInputError(
                f"the calibration text has {len(tokens)} tokens, less than one window of {self.context}",
                hint="Give a longer text (--calib-text).",
            )
        ids = torch.tensor(tokens[: available * self.context], dtype=torch.int64).reshape(-1, self.context)
        chosen = torch.linspace(0, available - 1, count).round().long()
        return list(ids[chosen].split(1))


class PartStore(Protocol):
    """Where finished blocks are kept; `qcompiler.workspace.Workspace` is one."""

    def finished(self, layer: str) -> dict[str, Any] | None:
        """What was noted of a finished part, or None."""
        ...

    def store(self, layer: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        """Keep a part."""
        ...

    def load(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        ...


class MemoryStore:
    """A `PartStore` that lives as long as the process."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}

    def finished(self, layer: str) -> dict[str, Any] | None:
        """See `PartStore`."""
        return self._parts[layer][1] if layer in self._parts else None

    def store(self, layer: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        """See `PartStore`."""
        self._parts[layer] = ({name: tensor.cpu() for name, tensor in tensors.items()}, info)

    def load(self, layer: str) -> dict[str, torch.Tensor]:
        """See `PartStore`."""
        return self._parts[layer][0]


@dataclass
class Calibration:
    """The outcome: quantized linears and tuned parameters, read from the store when asked for.

    Attributes:
        specs: Linear name → spec.
        skipped: Linear name → why it was left alone.
        blocks: Block name → figures of its quantization.
    """

    specs: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    _store: PartStore = field(default_factory=MemoryStore, repr=False)
    _block_of: dict[str, str] = field(default_factory=dict, repr=False)
    _parts: dict[str, list[str]] = field(default_factory=dict, repr=False)
    _parameters: dict[str, str] = field(default_factory=dict, repr=False)

    def tensors(self, linear: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a linear, part → tensor."""
        held = self._store.load(_key(self._block_of[linear]))
        return {part: held[f"{linear}.{part}"] for part in self._parts[linear]}

    @property
    def parameters(self) -> list[str]:
        """Names in the graph of the float tensors that were tuned."""
        return list(self._parameters)

    def parameter(self, name: str) -> torch.Tensor:
        """The tuned value of a float tensor, float32."""
        return self._store.load(_key(self._parameters[name]))[name]

    def note(self, block: str, info: dict[str, Any]) -> None:
        """Take up what the store holds of a block."""
        self.blocks[block] = info["figures"]
        for linear, spec in info["specs"].items():
            self.specs[linear] = get_format(spec["format"]).spec_from_json(spec)
            self._block_of[linear] = block
        self._parts.update(info["parts"])
        self._parameters.update(dict.fromkeys(info["parameters"], block))


def calibrate(
    gm: GraphModule,
    load: Callable[[str], torch.Tensor],
    tokens: Sequence[int],
    method: BlockQuantizer,
    choose: Choose,
    settings: CalibrationSettings | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    store: PartStore | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Quantize every block of a captured graph with calibration text.

    Args:
        gm: A captured graph (canonical linears: after `AddmmToLinear` where there are `addmm`); its
            weights may be meta tensors. Not changed.
        load: Checkpoint tensor by name; asked for attributes that are meta.
        tokens: The calibration text.
        method: The method.
        choose: (linear name, out_features, in_features) → its spec, or the reason why it is left alone.
        settings: How the text is run.
        options: The method's options, validated.
        store: Keeps finished blocks; blocks that it already holds are not done again.
        progress: Told of each block.
        device: Where to compute.

    Raises:
        UnsupportedModelError: The graph cannot be cut into blocks.
        InvalidInputError: The text is too short.
    """
    settings = settings or CalibrationSettings()
    outcome = Calibration(_store=store or MemoryStore())
    runner = _Runner(gm, load, settings, torch.device(device), options or {})
    runner.begin(settings.windows(tokens))
    with (progress or Progress()).stage(f"Calibrating {method.name}", len(runner.blocks)) as advance:
        for block in runner.blocks:
            specs = _choose(block, choose, outcome.skipped)
            found = outcome._store.finished(_key(block.name)) if specs else None
            weights = runner.weights_of(block)
            if specs and found is None:
                started = time.perf_counter()
                task = runner.task(block, specs, weights, (progress or Progress()).note)
                result = method.quantize_block(task)
                result.info["seconds"] = round(time.perf_counter() - started, 2)
                found = _store(outcome._store, block, result)
            if found is not None:
                outcome.note(block.name, found)
            runner.advance(block, weights, _float_weights(outcome, block, runner.device))
            advance(block.name)
    return outcome


def _key(block: str) -> str:
    return f"block:{block}"


def _choose(block: Block, choose: Choose, skipped: dict[str, str]) -> dict[str, Any]:
    specs = {}
    for linear in block.linears:
        spec = choose(linear.name, linear.out_features, linear.in_features)
        if isinstance(spec, str):
            skipped[linear.name] = spec
        else:
            specs[linear.name] = spec
    return specs


def _store(store: PartStore, block: Block, result: BlockResult) -> dict[str, Any]:
    quantized = {linear.weight for linear in block.linears if linear.name in result.tensors}
    tuned = {name: value for name, value in result.weights.items() if name not in quantized}
    tensors = {f"{name}.{part}": t for name, parts in result.tensors.items() for part, t in parts.items()}
    info = {
        "specs": {name: spec.to_json() for name, spec in result.specs.items()},
        "parts": {name: list(parts) for name, parts in result.tensors.items()},
        "parameters": list(tuned),
        "figures": result.info,
    }
    store.store(_key(block.name), {**tensors, **tuned}, info)
    return info


def _float_weights(outcome: Calibration, block: Block, device: torch.device) -> dict[str, torch.Tensor]:
    """The block's tensors as the artifact will have them, read back so that a resumed run sees the same."""
    weights = {}
    for linear in block.linears:
        if linear.name in outcome.specs:
            spec = outcome.specs[linear.name]
            stored = {part: t.to(device) for part, t in outcome.tensors(linear.name).items()}
            weights[linear.weight] = get_format(spec.name).dequantize(
                spec, stored, linear.in_features, torch.float32
            )
    for name, block_name in outcome._parameters.items():
        if block_name == block.name:
            weights[name] = outcome.parameter(name).to(device)
    return weights


class _Runner:
    """The two streams of values between the blocks, and the tensors of the block at hand."""

    def __init__(
        self,
        gm: GraphModule,
        load: Callable[[str], torch.Tensor],
        settings: CalibrationSettings,
        device: torch.device,
        options: Mapping[str, Any] | None = None,
    ):
        self._options = options or {}
        self.device = device
        self.settings = settings
        self._gm = gm
        self._load = load
        self._input, self.blocks, self._output = cut_blocks(gm)
        self._textual = _depends_on_text(gm)
        self._shared: dict[Node, Any] = {}
        self._quantized: list[dict[Node, Any]] = []
        self._original: list[dict[Node, Any]] | None = None
        # The graph may be captured in half precision; calibration computes in float32.
        halves = (torch.bfloat16, torch.float16)
        self._run = partial(run_nodes, dtypes=dict.fromkeys(halves, torch.float32), device=device)

    @torch.no_grad()
    def begin(self, windows: list[torch.Tensor]) -> None:
        """Run what stands before the first block."""
        weights = self.weights_of(self._input)
        placeholders = {str(n.target): n for n in self._gm.graph.nodes if n.op == "placeholder"}
        text = placeholders.pop("input_ids")
        length = windows[0].shape[1]
        for name, node in placeholders.items():
            row = torch.arange(length) if name == "position_ids" else torch.zeros(length, dtype=torch.int64)
            self._shared[node] = row[None].to(self.device)
        later = self._later_reads(0)
        for ids in windows:
            given = {**self._shared, text: ids.to(self.device)}
            wanted = [node for node in self._input.writes if node in later]
            values = self._run(self._input.nodes, given, weights.__getitem__, wanted)
            if text in later:
                values[text] = given[text]
            self._shared.update({n: v for n, v in values.items() if n not in self._textual})
            self._quantized.append(self._kept(values))
        if self.settings.follow_original:
            self._original = [dict(values) for values in self._quantized]

    def weights_of(self, block: Block) -> dict[str, torch.Tensor]:
        """The float tensors that a piece reads, float32 on the device; non-float ones as they are."""
        weights = {}
        for name in block.parameters:
            held = self._attribute(name)
            tensor = resolve(recipe_of(self._gm, name), self._load) if held.is_meta else held
            tensor = tensor.detach().to(self.device)
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        return weights

    def task(
        self,
        block: Block,
        specs: Mapping[str, Any],
        weights: dict[str, torch.Tensor],
        tell: Callable[[str], None],
    ) -> BlockTask:
        """The work on one block, as the method sees it."""
        return BlockTask(
            block,
            specs,
            weights,
            [self._inputs(values) for values in self._quantized],
            None if self._original is None else [self._inputs(values) for values in self._original],
            self._run,
            self.device,
            self.settings.stream_dtype,
            self.settings.seed,
            self._options,
            tell,
        )

    @torch.no_grad()
    def advance(self, block: Block, weights: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> None:
        """Move both streams behind a block."""
        later = self._later_reads(self.blocks.index(block) + 1)
        self._move(self._quantized, block, {**weights, **now}, later)
        if self._original is not None:
            self._move(self._original, block, weights, later)

    def _move(
        self, stream: list[dict[Node, Any]], block: Block, weights: dict[str, torch.Tensor], later: set[Node]
    ) -> None:
        wanted = [node for node in block.writes if node in later]
        for index, values in enumerate(stream):
            given = self._inputs(values)
            made = self._run(block.nodes, given, weights.__getitem__, wanted)
            self._shared.update({n: v for n, v in made.items() if n not in self._textual})
            stream[index] = self._kept({**{n: v for n, v in values.items() if n in later}, **made})

    def _inputs(self, values: Mapping[Node, Any]) -> _Window:
        return _Window(values, self._shared)

    def _kept(self, values: dict[Node, Any]) -> dict[Node, Any]:
        """The values of a window that depend on its text, in the dtype of the streams."""
        kept = {}
        for node, value in values.items():
            if node in self._textual:
                floating = isinstance(value, torch.Tensor) and value.is_floating_point()
                kept[node] = value.to(self.settings.stream_dtype) if floating else value
        return kept

    def _later_reads(self, first: int) -> set[Node]:
        """Values that block `first` or anything behind it reads."""
        return {node for piece in (*self.blocks[first:], self._output) for node in piece.reads}

    def _attribute(self, name: str) -> torch.Tensor:
        module_path, _, leaf = name.rpartition(".")
        return getattr(self._gm.get_submodule(module_path), leaf)


class _Window(Mapping[Node, Any]):
    """The values of one window over the shared ones; floats come out as float32."""

    def __init__(self, own: Mapping[Node, Any], shared: Mapping[Node, Any]):
        self._own = own
        self._shared = shared

    def __getitem__(self, node: Node) -> Any:
        if node not in self._own:
            return self._shared[node]
        value = self._own[node]
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def __iter__(self) -> Any:
        return iter({**self._shared, **self._own})

    def __len__(self) -> int:
        return len({**self._shared, **self._own})


def _depends_on_text(gm: GraphModule) -> set[Node]:
    """Nodes whose value changes with the tokens; sizes do not, since all windows are equally long."""
    textual: set[Node] = set()
    for node in gm.graph.nodes:
        source = node.op == "placeholder" and node.target == "input_ids"
        tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if source or (tensor and any(n in textual for n in node.all_input_nodes)):
            textual.add(node)
    return textual


__all__ = ["Calibration", "CalibrationSettings", "Linear", "MemoryStore", "PartStore", "calibrate"]
