"""`capture`: a transformers model as one FX graph over ragged tokens, without touching its weights.

The model is exported on the meta device with batch 1 and a symbolic token axis
T ≥ 1. Device arguments in the graph stay `torch.device("meta")`: the marker for
"where the model lives", which the runtime replaces.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import UserError, UserErrorType

from qcompiler.capture.buffers import materialize_buffers
from qcompiler.capture.graph import GraphBuilder
from qcompiler.capture.ragged import check_ragged, indices_to_positions
from qcompiler.capture.refusals import refuse_by_structure
from qcompiler.capture.rope import freeze_rope
from qcompiler.capture.source import ModelSource, build_skeleton
from qcompiler.kernels.errors import QCompilerError, UnsupportedModelError

# Tokens of the example that is traced: unlike any dimension of a model, so that no size is mistaken for T.
_EXAMPLE_TOKENS = 11
_PREFIX = "model"
_TRIED_TOKENS = (1, 2, 3, 4, 5, 8, 16, 63, 64, 65, 127, 128, 1000, 4096, 131071, 1 << 20)


@dataclass
class CapturedModel:
    """A model as a graph.

    Attributes:
        graph: Placeholders `input_ids` and `position_ids` int64 [1, T] (`token_type_ids` where an encoder has
            them), one output [1, T, …]. Weights are meta tensors under their state-dict names.
        config: The transformers config as JSON.
        kind: "decoder" (causal) or "encoder" (bidirectional).
        vocab_size: Rows of the input embedding.
        dtype: Parameter dtype.
        name: What the user called the model.
        tied: Alias → name, for weights the model holds under several names.
        max_positions: Context length that the model or the caller's `max_context` allows; None if unlimited.
        notes: Choices made in capture that a user should know of.
    """

    graph: fx.GraphModule
    config: dict[str, Any]
    kind: str
    vocab_size: int
    dtype: torch.dtype
    name: str
    tied: dict[str, str] = field(default_factory=dict)
    max_positions: int | None = None
    notes: list[str] = field(default_factory=list)


def capture(
    source: ModelSource, dtype: torch.dtype | None = None, *, max_context: int | None = None
) -> CapturedModel:
    """Export a model to a graph over ragged tokens.

    Args:
        source: The model.
        dtype: Parameter dtype; the config's own if None.
        max_context: Longest sequence in tokens; decides rotary types whose frequencies depend on the length.

    Raises:
        UnsupportedModelError: The model cannot be captured faithfully; says which part and why.
    """
    try:
        return _capture(source, dtype, max_context)
    except UnsupportedModelError as error:
        kind = source.config.model_type
        if kind in error.message:
            raise
        raise UnsupportedModelError(f"{kind} cannot be captured: {error.message}", hint=error.hint) from error


def _capture(source: ModelSource, dtype: torch.dtype | None, max_context: int | None) -> CapturedModel:
    model = build_skeleton(source.model_class, source.config, dtype)
    refuse_by_structure(model)
    frozen = freeze_rope(model, max_context)
    wrapper = _Forward(model)
    program = _export(wrapper, model.config.model_type)

    canonical, tensors = _names(model)
    persistent = set(model.state_dict())
    computed = {name for name, _ in model.named_buffers() if name not in persistent}
    used = {
        spec.target.removeprefix(f"{_PREFIX}.")
        for spec, node in zip(
            program.graph_signature.input_specs,
            (n for n in program.graph.nodes if n.op == "placeholder"),
            strict=True,
        )
        if node.users and isinstance(spec.target, str)
    }
    buffers = materialize_buffers(model, (computed & used) - set(frozen))
    for name, value in {**buffers, **frozen}.items():
        tensors[name] = value
    gm = GraphBuilder(program, _PREFIX, canonical, tensors).build()
    _check_output(gm)
    indices_to_positions(gm.graph)
    gm.recompile()
    kind = check_ragged(gm)
    notes = []
    if frozen:
        notes.append(f"rotary frequencies frozen for sequences of at most {max_context} tokens")
    config = source.config.to_dict()
    embedding: Any = model.get_input_embeddings()
    gm.meta["kind"] = kind
    return CapturedModel(
        graph=gm,
        config=config,
        kind=kind,
        vocab_size=int(embedding.weight.shape[0]),
        dtype=model.dtype,
        name=source.name,
        tied={alias: name for alias, name in canonical.items() if alias != name},
        max_positions=max_context or getattr(model.config, "max_position_embeddings", None),
        notes=notes,
    )


class _Forward(torch.nn.Module):
    """`forward(input_ids, position_ids[, token_type_ids])` → the model's first output tensor."""

    def __init__(self, model: Any):
        super().__init__()
        accepted = inspect.signature(model.forward).parameters
        setattr(self, _PREFIX, model)
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self.options["return_dict"] = True
        self.takes_token_types = (
            "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 0
        )
        self.position_offset = _position_offset(model)

    def example(self) -> tuple[torch.Tensor, ...]:
        tokens = torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.long, device="meta")
        return tuple(tokens.clone() for _ in range(3 if self.takes_token_types else 2))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        options = dict(self.options)
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        if self.position_offset:
            position_ids = position_ids + self.position_offset
        return getattr(self, _PREFIX)(input_ids=input_ids, position_ids=position_ids, **options)[0]


def _position_offset(model: Any) -> int:
    """Where a model's positions begin; RoBERTa-like tables count from the row after `padding_idx`."""
    for name, module in model.named_modules():
        table = name.rpartition(".")[2] == "position_embeddings" and isinstance(module, torch.nn.Embedding)
        if table and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _export(wrapper: _Forward, model_type: str) -> torch.export.ExportedProgram:
    example = wrapper.example()
    shapes = tuple({1: torch.export.Dim("T", min=1)} for _ in example)
    try:
        with torch.no_grad():
            try:
                return torch.export.export(wrapper, example, strict=False, dynamic_shapes=shapes)
            except UserError as error:
                # torch's solver gives up on guards such as T·min(64, 64·T) = 64·T;
                # kept as assertions in the graph, they can be tried
                if error.error_type != UserErrorType.CONSTRAINT_VIOLATION:
                    raise
                program = torch.export.export(
                    wrapper,
                    example,
                    strict=False,
                    dynamic_shapes=shapes,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
        _check_assertions(program)
        return program
    except QCompilerError:
        raise
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        AssertionError,
    ) as error:
        cause = _refusal_within(error)
        if cause is not None:
            raise cause from error
        lines = [line.strip(" -") for line in str(error).strip().splitlines() if line.strip()] or [""]
        reason = lines[1] if lines[0].startswith("Constraints violated") and len(lines) > 1 else lines[0]
        raise UnsupportedModelError(
            f"{model_type} cannot be captured: torch.export stopped with {type(error).__name__}: {reason}",
            hint="Its forward depends on the data or on the length in a way that one graph cannot hold.",
        ) from error


def _check_assertions(program: torch.export.ExportedProgram) -> None:
    """Assertions about T that torch could not prove must hold for every number of tokens that we try."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        condition = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
        if isinstance(condition, torch.SymBool):
            expression = condition.node.expr
            failed = [
                t for t in _TRIED_TOKENS if not expression.subs(dict.fromkeys(expression.free_symbols, t))
            ]
            if failed:
                raise UnsupportedModelError(
                    f"its forward does not work for {failed[0]} tokens: it needs {expression}"
                )


def _refusal_within(error: BaseException | None) -> UnsupportedModelError | None:
    while error is not None:
        if isinstance(error, UnsupportedModelError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _names(model: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Every parameter and buffer name → its first name, and first name → tensor."""
    canonical: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        canonical[name] = first.setdefault(id(tensor), name)
        tensors.setdefault(canonical[name], tensor)
    return canonical, tensors


def _check_output(gm: fx.GraphModule) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise UnsupportedModelError("the model's first output is no tensor")
