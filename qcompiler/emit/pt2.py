"""`.pt2`: the lowered program through `torch.export.save`, for processes that have torch and our ops alone.

Where it is loaded, `import qcompiler.kernels.ops` registers the ops and
`torch.export.load` does the rest. The program holds the ops as they stand in the
artifact, so the same file runs on a CPU and, moved, on a GPU. A `.pt2` holds a
pickle: it is an emission, and the artifact stays the thing to keep and to ship.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError
from qcompiler.kernels.library import registered_ops
from qcompiler.passes.graph_utils import op_name, set_attribute
from qcompiler.runtime.artifact import Artifact, open_artifact
from qcompiler.runtime.graph import DTYPE_BY_NAME, Graph, Input, ModelDevice, Ref, Weight

# Sizes to trace with: all distinct, none 0 or 1, so that no two are taken for the same.
_SIZES = {"T": 6, "R": 3, "S": 4, "S1": 5, "P": 7, "N": 31, "B": 16}
_LARGEST = 1 << 20
# Names that say what they are, and that sympy has not taken.
_NAMES = {
    "T": "tokens", "R": "rows", "S": "sequences", "P": "pages_of_one", "N": "pages", "B": "page_size",
}  # fmt: skip

_SCALARS: dict[str, Callable[..., Any]] = {
    "sym.size": torch.ops.aten.sym_size.int,
    "sym.getitem": operator.getitem,
    "sym.add": operator.add,
    "sym.sub": operator.sub,
    "sym.mul": operator.mul,
    "sym.floordiv": operator.floordiv,
    "sym.truediv": operator.truediv,
    "sym.mod": operator.mod,
    "sym.neg": operator.neg,
    "sym.abs": operator.abs,
    "sym.min": torch.sym_min,
    "sym.max": torch.sym_max,
    "sym.eq": operator.eq,
    "sym.ne": operator.ne,
    "sym.lt": operator.lt,
    "sym.le": operator.le,
    "sym.gt": operator.gt,
    "sym.ge": operator.ge,
    "sym.not": torch.sym_not,
    "sym.int": torch.sym_int,
    "sym.float": torch.sym_float,
}


def emit_pt2(
    source: str | os.PathLike[str] | Artifact | fx.GraphModule,
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    inputs: tuple[Any, ...] | None = None,
    shapes: Any = None,
) -> Path:
    """Write a program as `.pt2`.

    Args:
        source: An artifact; or a graph with real weights that passes have rewritten.
        out: The file to write; its name ends in `.pt2`. An existing file is replaced.
        device: Where an artifact's weights and constants go: "cpu" or "cuda".
        inputs: Of a graph: example inputs.
        shapes: Of a graph: which of their sizes vary, as torch.export's `dynamic_shapes`.

    Returns:
        The file.

    Raises:
        InvalidInputError: Another file name, a folder that does not exist, or a graph without inputs.
        UnsupportedModelError: torch.export does not take the program.
    """
    path = Path(out)
    if path.suffix != ".pt2":
        raise InvalidInputError(f"{path}: torch wants a file name that ends in .pt2")
    if not path.parent.is_dir():
        raise InvalidInputError(f"{path.parent} is not a folder", hint="Create it first.")
    if isinstance(source, fx.GraphModule):
        program = export_graph(source, inputs, shapes)
    else:
        program = export_artifact(source, device=device)
    partial = path.with_name(f"{path.stem}.partial.pt2")
    try:
        torch.export.save(program, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def export_artifact(
    source: str | os.PathLike[str] | Artifact, *, device: str = "cpu", numbers_as_sizes: bool = False
) -> ExportedProgram:
    """An artifact's program with its weights, exported with the sizes of its inputs dynamic.

    Inputs and their order are those of `graph.json` (docs/artifact.md); the KV pages are written in place.

    Args:
        source: The artifact.
        device: Of weights and constants.
        numbers_as_sizes: An input that is a number (`max_query_len`) becomes a uint8 tensor of that many
            elements, for AOTInductor, which takes tensors only.

    Raises:
        UnsupportedModelError: torch.export does not take the program.
    """
    artifact = source if isinstance(source, Artifact) else open_artifact(Path(source))
    graph = artifact.graph
    module = graph_module(graph, artifact.read, torch.device(device), numbers_as_sizes)
    inputs = example_inputs(graph.inputs, torch.device(device), numbers_as_sizes)
    shapes = dynamic_shapes(graph.inputs, numbers_as_sizes)
    return _export(module, tuple(inputs.values()), shapes)


def export_graph(gm: fx.GraphModule, inputs: tuple[Any, ...] | None, shapes: Any = None) -> ExportedProgram:
    """A graph that passes have rewritten, with its weights, exported once more.

    Raises:
        InvalidInputError: No example inputs, weights on meta, or ops that the kernels alone do not register.
        UnsupportedModelError: torch.export does not take the graph.
    """
    if inputs is None:
        raise InvalidInputError("a graph is exported with example inputs", hint="Pass inputs=(x, …).")
    held = [*gm.named_parameters(), *gm.named_buffers()]
    meta = next((name for name, tensor in held if tensor.is_meta), None)
    if meta is not None:
        raise InvalidInputError(f"weight {meta} is on meta, without values", hint="Resolve its recipe first.")
    for node in gm.graph.nodes:
        known = registered_ops().get(op_name(node) or "")
        if known is not None and known.reference.__module__.startswith("qcompiler.kernels.cpu"):
            raise InvalidInputError(
                f"node {node.name} calls {known.name}, which runs on repacked weights of one device",
                hint="Leave SelectKernels out of the passes of a graph that is emitted.",
            )
    return _export(gm, inputs, shapes)


def _export(module: fx.GraphModule, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"torch.export does not take the program: {reason}") from error


def graph_module(
    graph: Graph,
    read: Callable[[str, torch.device], torch.Tensor],
    device: torch.device,
    numbers_as_sizes: bool = False,
) -> fx.GraphModule:
    """A decoded graph as an FX module that holds its weights.

    Args:
        graph: From an artifact.
        read: A weight by name, on a device.
        device: Of weights and constants.
        numbers_as_sizes: See `export_artifact`.
    """
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    made: dict[str, fx.Node] = {i.name: module.graph.placeholder(i.name) for i in graph.inputs}
    for declared in graph.inputs:
        if numbers_as_sizes and declared.dtype == "int":
            made[declared.name] = module.graph.call_function(
                torch.ops.aten.sym_size.int, (made[declared.name], 0)
            )
    weights: dict[str, fx.Node] = {}
    for name in graph.weights:
        set_attribute(module, name, read(name, device))
        weights[name] = module.graph.get_attr(name)

    def value(item: Any) -> Any:
        if isinstance(item, Ref):
            return made[item.name]
        if isinstance(item, Weight):
            return weights[item.name]
        if isinstance(item, ModelDevice):
            return device
        return [value(part) for part in item] if isinstance(item, tuple) else item

    for node in graph.nodes:
        target: Any = _SCALARS[node.op] if node.target is None else node.target
        args = tuple(value(item) for item in node.args)
        kwargs = {key: value(item) for key, item in node.kwargs.items()}
        made[node.name] = module.graph.call_function(target, args, kwargs)
    results = tuple(made[item.name] for item in graph.outputs)
    module.graph.output(results[0] if len(results) == 1 else results)
    module.graph.lint()
    module.recompile()
    return module


def example_inputs(
    inputs: list[Input], device: torch.device, numbers_as_sizes: bool = False
) -> dict[str, Any]:
    """Inputs to trace and probe with, by name: four sequences, the first two of two tokens."""
    sizes = dict(_SIZES)
    made: dict[str, Any] = {}
    for declared in inputs:
        shape = [s if isinstance(s, int) else sizes.setdefault(s, 40 + len(sizes)) for s in declared.shape]
        if declared.dtype == "int":
            number = torch.zeros(2, dtype=torch.uint8, device=device)
            made[declared.name] = number if numbers_as_sizes else 2
        else:
            made[declared.name] = torch.zeros(shape, dtype=DTYPE_BY_NAME[declared.dtype], device=device)
    if "query_start" in made:
        starts = torch.tensor([0, 2, 4, 5, 6], dtype=torch.int32, device=device)
        made["query_start"] = starts
    if "slots" in made:
        made["slots"] = torch.tensor([0, 1, 16, 17, 32, 48], device=device)
        made["seq_lens"] = torch.tensor([2, 2, 1, 1], dtype=torch.int32, device=device)
        table = torch.arange(_SIZES["S"], dtype=torch.int32, device=device)
        made["block_table"] = table[:, None].expand(-1, _SIZES["P"]).contiguous()
        made["position_ids"] = torch.tensor([[0, 1, 0, 1, 0, 0]], device=device)
        made["logits_rows"] = torch.tensor([1, 3, 5], device=device)
    return made


def dynamic_shapes(inputs: list[Input], numbers_as_sizes: bool = False) -> list[Any]:
    """What torch.export is told of each input's sizes: those with one name are one dimension."""
    names = {size for declared in inputs for size in declared.shape if isinstance(size, str)}
    dims: dict[str, Any] = {n: Dim(_NAMES.get(n, n), min=1, max=_LARGEST) for n in names - {"S1"}}
    if "S1" in names:  # one more than the sequences
        dims["S1"] = dims["S"] + 1 if "S" in dims else Dim("query_starts", min=2, max=_LARGEST)
    number = {0: Dim("number", min=1, max=_LARGEST)} if numbers_as_sizes else Dim.DYNAMIC
    return [
        number
        if declared.dtype == "int"
        else {axis: dims[size] for axis, size in enumerate(declared.shape) if isinstance(size, str)} or None
        for declared in inputs
    ]
