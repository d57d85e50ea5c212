"""Checks that nothing but attention looks across tokens, so that sequences laid end to end stay strangers.

The token axis is followed through the graph by its symbol T in the shapes. An op
that reduces, scans, slices, gathers or contracts over that axis, or makes
positions out of token indices, would let one sequence of a ragged batch see
another, and a [T, T] tensor is an attention that we were not shown. The one
exception is routing to experts: sorting a flat integer list of expert numbers
gives a permutation, and rows may be gathered by it.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from qcompiler.kernels.errors import UnsupportedModelError

aten = torch.ops.aten

_ATTENTION = "qcompiler::attention"
_SCANS = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff", "flip", "roll", "unfold"}
_REDUCTIONS = {
    "sum", "mean", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "norm",
    "linalg_vector_norm", "softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "any", "all",
    "topk", "sort", "argsort",
    "var_mean", "std_mean", "median", "count_nonzero", "nansum",
}  # fmt: skip
_CONTRACTIONS = {"mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "dot", "mv"}
_CUTS = {"slice", "select", "narrow", "slice_scatter", "select_scatter"}
_GATHERS = {
    "index",
    "index_select",
    "gather",
    "take_along_dim",
    "index_put",
    "index_add",
    "scatter",
    "scatter_add",
}
_COUNTERS = {
    "arange",
    "linspace",
    "searchsorted",
    "bucketize",
    "histc",
    "bincount",
    "nonzero",
    "unique",
    "_unique2",
}
_SCALARS = {"item", "_local_scalar_dense", "is_nonzero"}


def check_ragged(gm: fx.GraphModule) -> str:
    """The kind of the model, "decoder" or "encoder", after checking its graph.

    Raises:
        UnsupportedModelError: No attention was seen, or an op looks across tokens; names op and module.
    """
    calls = [node for node in gm.graph.nodes if _schema_name(node) == _ATTENTION]
    if not calls:
        raise UnsupportedModelError(
            "none of its layers calls an attention function of transformers "
            "(recurrent, linear or its own attention)"
        )
    inputs = next(node for node in gm.graph.nodes if node.op == "placeholder")
    checker = _Checker(inputs.meta["val"].shape[1])
    for node in gm.graph.nodes:
        if node.op == "call_function":
            checker.check(node)
    causal = {bool(node.args[4]) for node in calls}
    if len(causal) == 2:
        raise UnsupportedModelError("it mixes causal and bidirectional attention")
    return "decoder" if causal.pop() else "encoder"


def indices_to_positions(graph: fx.Graph) -> int:
    """Replace the token indices 0…T−1 that a model counts itself by the position_ids; returns how many.

    Without a cache and with one sequence they are the same; with several only the latter are right.
    """
    input_ids, position_ids = [node for node in graph.nodes if node.op == "placeholder"][:2]
    tokens = input_ids.meta["val"].shape[1]
    if isinstance(tokens, int):
        return 0
    found = [node for node in graph.nodes if _counts_tokens(node, tokens)]
    for node in found:
        with graph.inserting_before(node):
            flat = graph.call_function(aten.reshape.default, (position_ids, [-1]))
            flat.meta = {**node.meta, "val": position_ids.meta["val"].reshape(-1)}
            value = node.meta["val"]
            if value.dtype != torch.int64:
                flat = graph.call_function(aten.to.dtype, (flat, value.dtype))
                flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
    return len(found)


def _counts_tokens(node: fx.Node, tokens: Any) -> bool:
    if node.op != "call_function" or _schema_name(node) != "aten::arange":
        return False
    [size] = _shape(node)
    starts = _argument(node, "start", 0) or 0
    steps = _argument(node, "step", 1) or 1
    same = isinstance(size, torch.SymInt) and bool(size.node.expr == tokens.node.expr)
    return same and isinstance(starts, int) and starts == 0 and steps == 1


class _Checker:
    def __init__(self, tokens: Any):
        if isinstance(tokens, int):
            raise UnsupportedModelError(f"its forward works for {tokens} tokens only")
        self.symbol: Any = tokens.node.expr
        self.routing: set[fx.Node] = set()

    def check(self, node: fx.Node) -> None:
        """Refuse an op that looks across tokens."""
        name = _schema_name(node)
        if getattr(node.target, "__name__", "") == "getitem" and node.args[0] in self.routing:
            self.routing.add(node)
        if not name or name == _ATTENTION:
            return
        op = name.split("::")[1]
        for value in _tensors(node):
            self._check_shape(node, value)
        if op in _SCALARS:
            self._refuse(node, "turns a tensor into a number that the program depends on")
        elif op in _COUNTERS:
            self._check_counter(node, op)
        elif op in ("max", "min") and len(node.all_input_nodes) == 2:
            pass  # the larger of two, element by element
        elif op in _SCANS or op in _REDUCTIONS:
            self._check_reduction(node, op)
        elif op in _CONTRACTIONS:
            self._check_contraction(node, op)
        elif op == "einsum":
            self._check_einsum(node)
        elif op in _CUTS:
            self._check_cut(node)
        elif op in _GATHERS:
            self._check_gather(node)
        elif op in ("cat", "stack"):
            self._check_cat(node, op)
        elif op in ("pad", "constant_pad_nd"):
            self._check_pad(node)
        elif op.startswith("conv") or "pool" in op:
            if any(self._has(size) for size in _shape(node.args[0])[1:]):
                self._refuse(node, "is a convolution over tokens")
        elif self._only_routing(node):
            self.routing.add(node)

    def _only_routing(self, node: fx.Node) -> bool:
        sources = node.all_input_nodes
        return bool(sources) and all(source in self.routing for source in sources)

    def _has(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols

    def _token_dims(self, node: Any) -> set[int]:
        return {i for i, size in enumerate(_shape(node)) if self._has(size)}

    def _refuse(self, node: fx.Node, why: str) -> None:
        raise UnsupportedModelError(
            f"{node.target} in {_module(node)} {why}",
            hint="Sequences stand end to end on one token axis; only attention may look along it.",
        )

    def _check_shape(self, node: fx.Node, value: torch.Tensor) -> None:
        for size in value.shape:
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols - {self.symbol}:
                self._refuse(node, "makes a tensor whose size depends on the data")
        found: list[Any] = [size for size in value.shape if self._has(size)]
        if len(found) > 1:
            self._refuse(
                node, "makes a tensor of tokens by tokens: an attention or a bias of the model's own"
            )
        for size in found:
            factor = sympy.simplify(size.node.expr / self.symbol)
            if not factor.is_Integer:
                self._refuse(node, f"cuts the tokens into pieces ({size} of {self.symbol})")

    def _check_counter(self, node: fx.Node, op: str) -> None:
        if op in ("searchsorted", "bucketize"):
            if all(n in self.routing or not self._token_dims(n) for n in node.all_input_nodes):
                return
        elif op in ("arange", "linspace"):
            if not self._token_dims(node):
                return
        elif not any(self._token_dims(n) for n in node.all_input_nodes):
            return
        self._refuse(node, "numbers or counts the tokens of the batch instead of using their position_ids")

    def _check_reduction(self, node: fx.Node, op: str) -> None:
        source = node.args[0]
        dims = self._token_dims(source)
        if not dims:
            return
        if op in ("sort", "argsort") and len(_shape(source)) == 1 and not _val(source).is_floating_point():
            self.routing.add(node)
            return
        over = _dims(node, len(_shape(source)))
        if over is None or over & dims:
            self._refuse(node, "runs over the tokens")

    def _check_contraction(self, node: fx.Node, op: str) -> None:
        left, right = node.args[1:3] if op in ("addmm", "baddbmm") else node.args[:2]
        contracted = _shape(left)[-1]
        if self._has(contracted):
            self._refuse(node, "sums over the tokens")
        if op == "linear" and self._token_dims(right):
            self._refuse(node, "uses tokens as weights")

    def _check_einsum(self, node: fx.Node) -> None:
        equation, operands = node.args[0], node.args[1]
        left, _, right = str(equation).replace(" ", "").partition("->")
        for letters, operand in zip(left.split(","), operands, strict=True):  # type: ignore[arg-type]
            if "." in letters:
                self._refuse(node, f"is an einsum with an ellipsis ({equation})")
            if any(self._has(s) and c not in right for c, s in zip(letters, _shape(operand), strict=True)):
                self._refuse(node, "sums over the tokens")

    def _check_cut(self, node: fx.Node) -> None:
        dims = self._token_dims(node.args[0])
        dim = _argument(node, "dim", 0) % max(1, len(_shape(node.args[0])))
        if dim not in dims:
            return
        before, after = _shape(node.args[0])[dim], _shape(node)
        if (
            len(after) == len(_shape(node.args[0]))
            and str(after[dim]) == str(before)
            and "scatter" not in str(node.target)
        ):
            return
        self._refuse(
            node, "picks tokens by where they stand in the batch (such as the first token, for pooling)"
        )

    def _check_gather(self, node: fx.Node) -> None:
        source = node.args[0]
        dims = self._token_dims(source)
        if not dims:
            return
        indices = node.args[1]
        if isinstance(indices, (list, tuple)):
            taken = [(i, index) for i, index in enumerate(indices) if index is not None]
        else:
            taken = [(int(indices) % len(_shape(source)), node.args[2])]  # type: ignore[arg-type]
        for dim, index in taken:
            if dim in dims and index not in self.routing:
                self._refuse(node, "gathers tokens by an index")
            if index in self.routing and source in self.routing:
                self.routing.add(node)

    def _check_cat(self, node: fx.Node, op: str) -> None:
        parts = node.args[0]
        rank = len(_shape(node))
        dim = _argument(node, "dim", 0) % rank
        if op == "cat" and any(dim in self._token_dims(part) for part in parts):  # type: ignore[union-attr]
            self._refuse(node, "joins other rows to the tokens")

    def _check_pad(self, node: fx.Node) -> None:
        dims, pads = self._token_dims(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        rank = len(_shape(node.args[0]))
        for i in range(len(pads) // 2):
            if rank - 1 - i in dims and (pads[2 * i] != 0 or pads[2 * i + 1] != 0):
                self._refuse(node, "shifts or pads the tokens")


def _schema_name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _val(node: Any) -> torch.Tensor:
    return node.meta["val"]


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An op's argument by its schema name, positional or not."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            return argument.default_value if argument.default_value is not None else default
    return None


def _dims(node: fx.Node, rank: int) -> set[int] | None:
    """The dimensions that a reduction runs over; None for all."""
    given = _argument(node, "dim", None)
    if given is None:
        given = _argument(node, "dims", None)
    if given is None or given == []:
        return None
    given = given if isinstance(given, (list, tuple)) else [given]
    return {int(dim) % rank for dim in given}


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    inner = list(stack.values())[-1] if stack else None
    return f"{inner[0] or 'the model'} ({str(inner[1]).rpartition('.')[2]})" if inner else "the model"
