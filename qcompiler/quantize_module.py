"""`qcompiler.quantize(model, method=..., bits=...)`: any torch module with its linears in a storage format.

Without a graph, a checkpoint or an artifact: `nn.Linear` (and GPT-2's Conv1D) make room for `StoredLinear`,
everything else stays as it is. The result runs, takes part in `state_dict`, and exports with `torch.export`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats import get_format
from qcompiler.layer_plan import LayerPlan
from qcompiler.methods.base import Method, get_method
from qcompiler.methods.calibrated import CalibratedMethod
from qcompiler.options import DTYPES, CompileOptions
from qcompiler.stored_linear import StoredLinear

log = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    method: str = "hqq",
    bits: int | None = None,
    *,
    group_size: int | None = None,
    skip: Sequence[str] = (),
    bits_overrides: Mapping[str, int] | None = None,
    lm_head_bits: int | None = None,
    dtype: torch.dtype | str | None = None,
    options: Mapping[str, Any] | None = None,
    inplace: bool = False,
    lean: bool = False,
) -> nn.Module:
    """Replace the linears of a module by quantized ones.

    Args:
        model: Any module; one on the meta device gets stored tensors on meta, ready for `load_state_dict`
            with `assign=True`.
        method: A method that needs no calibration text: hqq, rtn, bnb, eetq, or a plug-in.
        bits: Bits per weight code; None is the method's default.
        group_size: Input features per scale; 0 = one group per row; None = the method's default.
        skip: Shell patterns of linears to leave alone (`*.o_proj`, `encoder.*`).
        bits_overrides: Pattern → bits for some linears; the last match wins.
        lm_head_bits: Quantize the output head too, at this width. The head is what a transformers model
            names so, and any linear whose weight another kind of module reads too (a tied embedding keeps
            its float weight).
        dtype: Dtype of the float parameters and buffers that remain; None leaves them as they are.
        options: The method's own options, e.g. `{"quant_type": "fp4"}`.
        inplace: Change `model` itself and let each float weight go once it is quantized. By default `model`
            stays as it is and the result has copies of what it keeps.
        lean: On a CPU keep no dense copy beside the codes: less memory, slower long inputs.

    Returns:
        The quantized module, in the same training or evaluation mode; for inference only.

    Raises:
        InvalidInputError: The module has no linear to quantize, a pattern matches none of them, or an option
            does not fit the method.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"a torch module was expected, not {type(model).__name__}",
            hint="A checkpoint folder or hub id is compiled by qcompile.",
        )
    chosen = _method(method)
    settings = CompileOptions(
        model=type(model).__name__,
        method=method,
        bits=chosen.default_bits if bits is None else bits,
        group_size=group_size,
        skip=(skip,) if isinstance(skip, str) else tuple(skip),
        bits_overrides=tuple((bits_overrides or {}).items()),
        lm_head_bits=lm_head_bits,
        method_options=chosen.validate(options),
    )
    chosen.resolve_spec(settings.bits, group_size, settings.method_options)  # refuses impossible widths now
    specs = _choose(model, chosen, settings)
    target = _dtype(dtype)
    result = _converted(model, target) if inplace else _copied(model, specs, target)
    return _replace_linears(result, specs, chosen, settings.method_options, target, lean)


def _method(name: str) -> Method:
    method = get_method(name)
    if isinstance(method, CalibratedMethod):
        raise InvalidInputError(
            f"method {name!r} calibrates on text that runs through a captured model; quantize() has none",
            hint="Use hqq, rtn, bnb or eetq here, or compile the checkpoint: qcompile MODEL --method " + name,
        )
    if not method.quantizes:
        raise InvalidInputError(f"method {name!r} does not quantize", hint="Use the module as it is.")
    return method


def _choose(model: nn.Module, method: Method, settings: CompileOptions) -> dict[str, Any]:
    """Name of each linear to replace → its spec; the others are logged with the reason why not."""
    linears = dict(_linears(model))
    heads = frozenset(_heads(model, linears))
    plan = LayerPlan(settings, head_names=heads)
    specs: dict[str, Any] = {}
    for name, module in linears.items():
        bits = plan.bits_for(name) if name else settings.bits
        if isinstance(bits, str):
            reason = bits.replace("--lm-head-bits", "lm_head_bits").replace("--skip", "skip")
            log.info("%s stays float: %s", name, reason)
            continue
        spec = method.resolve_spec(bits, settings.group_size, settings.method_options)
        try:
            get_format(spec.name).tensor_specs(spec, *_shape(module))
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error.message}", hint=error.hint or "Skip it.") from error
        specs[name] = spec
    plan.check_all_used(list(linears))
    if not specs:
        found = f"its {len(linears)} linears are all left alone" if linears else "it has no nn.Linear"
        raise InvalidInputError(
            f"{type(model).__name__}: nothing to quantize, {found}",
            hint="Quantize an output head with lm_head_bits." if linears else None,
        )
    return specs


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears by name, each module once. Subclasses are left alone: their forward may read the weight."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear or _is_conv1d(module):
            yield name, module


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's Conv1D, a linear whose weight is [in, out]; told by its make, transformers is not needed."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and not isinstance(module, nn.Conv1d)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = getattr(module, "weight").shape  # noqa: B009 (a Module's attributes are untyped)
    return (columns, rows) if _is_conv1d(module) else (rows, columns)


def _heads(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[str]:
    """The output head that the model names, and linears tied to a module of another kind."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    ours = set(map(id, linears.values()))
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in ours
        for parameter in module._parameters.values()
    }
    for name, module in linears.items():
        if name and (module is head or id(module.weight) in elsewhere):
            yield name


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    known = {name: getattr(torch, name) for name in DTYPES if name != "auto"}
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found not in known.values():
        raise InvalidInputError(f"dtype {dtype!r} is not known", hint=f"Choose one of {', '.join(known)}.")
    return found


def _kept_floats(model: nn.Module) -> list[Tensor]:
    """Float parameters and those float buffers that a checkpoint holds (not, say, rotary frequencies)."""
    transient = {
        id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set
    }
    tensors = [*model.parameters(), *(b for b in model.buffers() if id(b) not in transient)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _converted(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    for tensor in _kept_floats(model) if dtype else ():
        tensor.data = tensor.data.to(dtype)
    return model


def _copied(model: nn.Module, specs: Mapping[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """A copy of the module, in `dtype`, that shares with it only the weights about to be replaced."""
    replaced = {id(module) for name, module in model.named_modules() if name in specs}
    kept = {
        id(tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if id(module) not in replaced or name != "weight"
    }
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters() if id(tensor) not in kept}
    for tensor in _kept_floats(model) if dtype else ():
        if id(tensor) in kept and tensor.dtype != dtype:
            moved = tensor.detach().to(dtype)
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if parameter else moved
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _replace_linears(
    model: nn.Module,
    specs: Mapping[str, Any],
    method: Method,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
    lean: bool,
) -> nn.Module:
    """Put a `StoredLinear` in the place of each named linear, wherever it stands; gives the root back."""
    linears = {name: module for name, module in model.named_modules() if name in specs}
    readers = Counter(id(module.weight) for module in linears.values())
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            places.setdefault(id(module), []).append((parent, child))
    tied: dict[tuple[int, Any], dict[str, Tensor]] = {}
    for name, spec in specs.items():
        module = linears.pop(name)  # nothing else here keeps a float weight alive
        weight: Any = module.weight
        tensors = tied.get((id(weight), spec))
        if tensors is None:
            matrix = weight.detach().t() if _is_conv1d(module) else weight.detach()
            tensors = _store(matrix, spec, method, options, name)
            if readers[id(weight)] > 1:
                tied[id(weight), spec] = tensors
        rows, columns = _shape(module)
        bias: Any = getattr(module, "bias", None)
        new = StoredLinear(spec, tensors, columns, rows, bias, dtype or weight.dtype, lean=lean)
        new.train(module.training)
        for parent, child in places.get(id(module), ()):
            parent._modules[child] = new
        if not name:
            return new
    return model


def _store(
    matrix: Tensor, spec: Any, method: Method, options: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    if not matrix.is_meta:
        return dict(method.quantize(matrix.contiguous(), spec, options, name=name))
    shapes = get_format(spec.name).tensor_specs(spec, *matrix.shape)
    return {part: torch.empty(item.shape, dtype=item.dtype, device="meta") for part, item in shapes.items()}
