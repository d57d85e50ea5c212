"""The ops that a graph file may name, and the scalar functions on sizes.

An artifact's graph is data: an op is looked up in this table by its exact
overload name and in no other way. The aten names are those that captures of
transformers models contain, after canonicalisation or before it; ops that
read files, draw random numbers or resize their inputs are not among them.
`qcompiler.*` means the canonical ops of `qcompiler.kernels.ops`, and those that
an installed package declares with its storage format.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from qcompiler.kernels.errors import ArtifactError

# Version of each op library: raised when an op's meaning changes or a new op is needed.
OP_LIBRARIES = {"aten": 1, "qcompiler": 3, "sym": 1}
# A format that another package brings is a library of its own: "format:<name>".
FORMAT_LIBRARY = "format:"

_ATEN = """
abs.default add.Scalar add.Tensor add_.Tensor addmm.default alias.default all.default amax.default
amin.default any.default arange.default arange.start arange.start_step argmax.default argmin.default
argsort.default argsort.stable baddbmm.default bincount.default bitwise_and.Scalar bitwise_and.Tensor
bitwise_not.default bitwise_or.Tensor bmm.default broadcast_to.default cat.default ceil.default
chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default clone.default concat.default
contiguous.default copy.default copy_.default cos.default cumsum.default detach.default diff.default
div.Scalar div.Tensor div.Tensor_mode div_.Tensor dropout.default einsum.default elu.default
embedding.default empty.memory_format empty_like.default eq.Scalar eq.Tensor erf.default exp.default
expand.default expand_as.default fill_.Scalar flatten.using_ints floor.default floor_divide.Scalar
floor_divide.default full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default
group_norm.default _grouped_mm.default gt.Scalar gt.Tensor hardswish.default histc.default index.Tensor
index_add.default index_add_.default index_copy.default index_put.default index_put_.default
index_select.default isinf.default isnan.default layer_norm.default le.Scalar le.Tensor leaky_relu.default
lift_fresh.default lift_fresh_copy.default linear.default log.default log1p.default logical_and.default
logical_not.default logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor
masked_fill_.Scalar matmul.default max.default max.dim max.other maximum.default mean.default mean.dim
min.default min.dim min.other minimum.default mish.default mm.default mul.Scalar mul.Tensor mul_.Tensor
narrow.default native_layer_norm.default ne.Scalar ne.Tensor neg.default new_empty.default new_full.default
new_ones.default new_zeros.default nonzero.default one_hot.default ones.default ones_like.default
outer.default permute.default polar.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor repeat.default
repeat_interleave.self_int reshape.default rms_norm.default roll.default round.default rsqrt.default
rsub.Scalar scalar_tensor.default scatter.src scatter.value scatter_.src scatter_.value scatter_add.default
scatter_add_.default searchsorted.Tensor select.int sigmoid.default sign.default silu.default sin.default
slice.Tensor slice_scatter.default _softmax.default softmax.int softplus.default sort.default sort.stable
split.Tensor split.sizes split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim
squeeze.dims stack.default sub.Scalar sub.Tensor sub_.Tensor sum.default sum.dim_IntList t.default
tanh.default tile.default to.device to.dtype to.dtype_layout to.other _to_copy.default topk.default
transpose.int tril.default triu.default true_divide.Tensor type_as.default unbind.int unflatten.int
_unsafe_view.default unsqueeze.default var.correction view.default view.dtype view_as.default
view_as_complex.default view_as_real.default where.ScalarOther where.ScalarSelf where.self xlogy.Tensor
zero_.default zeros.default zeros_like.default
"""
ATEN_OPS = frozenset(f"aten.{name}" for name in _ATEN.split())

# Sizes are at most this, whatever a graph computes with them.
_MAX_SCALAR = 1 << 62


def _bounded(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        result = fn(*args)
        if not -_MAX_SCALAR < result < _MAX_SCALAR:
            raise ArtifactError("a size computed by the graph leaves the 62-bit range")
        return result

    return call


def _size(x: torch.Tensor, dim: int) -> int:
    return x.shape[dim]


# name -> (number of arguments, function on Python scalars)
SYM_OPS: dict[str, tuple[int, Callable[..., Any]]] = {
    "sym.size": (2, _size),
    "sym.getitem": (2, operator.getitem),
    "sym.add": (2, _bounded(operator.add)),
    "sym.sub": (2, _bounded(operator.sub)),
    "sym.mul": (2, _bounded(operator.mul)),
    "sym.floordiv": (2, operator.floordiv),
    "sym.truediv": (2, operator.truediv),
    "sym.mod": (2, operator.mod),
    "sym.neg": (1, operator.neg),
    "sym.abs": (1, operator.abs),
    "sym.min": (2, min),
    "sym.max": (2, max),
    "sym.eq": (2, operator.eq),
    "sym.ne": (2, operator.ne),
    "sym.lt": (2, operator.lt),
    "sym.le": (2, operator.le),
    "sym.gt": (2, operator.gt),
    "sym.ge": (2, operator.ge),
    "sym.not": (1, operator.not_),
    "sym.int": (1, int),
    "sym.float": (1, float),
}


def is_allowed(name: str) -> bool:
    """True if a graph file may use an op of this name."""
    return name in ATEN_OPS or name in SYM_OPS or name in _own_ops() or plugin_library(name) is not None


def plugin_library(name: str) -> str | None:
    """The op library, as a manifest lists it, of an op that an installed package's format declares."""
    from qcompiler.kernels.formats.plugins import plugin_of

    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "qcompiler" or parts[2] != "default" or name in _own_ops():
        return None
    format_ = plugin_of(parts[1])
    return None if format_ is None else f"{FORMAT_LIBRARY}{format_.name}"


def library_version(library: str) -> int | None:
    """The version of an op library that this installation has, or None if it has no such library."""
    from qcompiler.kernels.formats.plugins import plugin_format

    if library.startswith(FORMAT_LIBRARY):
        format_ = plugin_format(library.removeprefix(FORMAT_LIBRARY))
        return None if format_ is None else format_.version
    return OP_LIBRARIES.get(library)


def resolve(name: str, where: str) -> torch._ops.OpOverload | None:
    """The overload of an allowed op, or None for a scalar function (`SYM_OPS`).

    Raises:
        ArtifactError: the op is not on the list, or this torch does not have it.
    """
    if name in SYM_OPS:
        return None
    if not is_allowed(name):
        raise ArtifactError(
            f"{where}: op {name[:80]!r} is not on the list of ops that a graph may use",
            hint="Compile the model again with this version, upgrade qcompiler, or install the package that "
            "brings the op's format.",
        )
    namespace, op, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except AttributeError:
        raise ArtifactError(
            f"{where}: op {name!r} does not exist in torch {torch.__version__}", hint="Upgrade torch."
        ) from None


def _own_ops() -> frozenset[str]:
    import qcompiler.kernels.ops  # noqa: F401  (registers them)
    from qcompiler.kernels.library import registered_ops

    # Only the canonical ops: those of providers take repacked weights, whose shapes nothing here checks.
    canonical = "qcompiler.kernels.ops."
    return frozenset(
        f"qcompiler.{name}.default"
        for name, op in registered_ops().items()
        if op.reference.__module__.startswith(canonical)
    )
