"""Quantized linears and embeddings as the block-quantized operators of onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompiler.emit.onnx.builder import CONTRIB
from qcompiler.emit.onnx.packing import AffineWeight, Blocks, blocks_of, pack_int8
from qcompiler.emit.onnx.pointwise import gelu, silu
from qcompiler.emit.onnx.translation import Translation, Value
from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.kernels.formats.calls import StoredWeight, stored_weight
from qcompiler.kernels.formats.lut4 import LUT4, num_blocks
from qcompiler.runtime.graph import Weight

Call = Mapping[str, Any]
_BNB4_TYPES = {"fp4": 0, "nf4": 1}
LLM_INT8_NOTE = "LLM.int8() layers are emitted weight-only: activations are not rounded to int8"


def _stored(t: Translation, call: Call) -> tuple[StoredWeight, dict[str, str]]:
    """The weight that a call reads, and the names of its tensors."""
    op = t.node.op.removeprefix("qcompiler.").removesuffix(".default")

    def describe(argument: Any) -> Any:
        if not isinstance(argument, Weight):
            raise t.refuse("its weight is computed by the graph")
        return t.tensors[argument.name]

    weight = stored_weight(op, call, describe)
    if weight is None:
        raise t.refuse("it reads no stored weight")
    return weight, {part: argument.name for part, argument in weight.tensors.items()}


def _add_bias(t: Translation, name: str, bias: Any, dtype: torch.dtype) -> str:
    return name if bias is None else t.call("Add", [name, t.tensor(bias, dtype).name])


def _base(names: Mapping[str, str]) -> str:
    return next(iter(names.values())).rpartition(".")[0]


def _affine_inputs(
    t: Translation, spec: AffineSpec, names: dict[str, str], blocks: Blocks, dtype: torch.dtype
) -> list[str]:
    """Codes, scales and zero points of an affine weight for MatMulNBits."""
    weight, base = AffineWeight(spec, names, blocks.columns, t.read), _base(names)
    codes = t.builder.weight(f"{base}.codes", torch.uint8, blocks.code_shape, lambda: weight.codes(blocks))
    return [codes, *_affine_statistics(t, weight, base, blocks, dtype)]


def _affine_statistics(
    t: Translation, weight: AffineWeight, base: str, blocks: Blocks, dtype: torch.dtype
) -> list[str]:
    shape = (blocks.rows, blocks.count)
    scales = t.builder.weight(f"{base}.scales", dtype, shape, lambda: weight.scales(blocks, dtype))
    if t.float_zeros:
        zeros = t.builder.weight(f"{base}.zeros", dtype, shape, lambda: weight.float_zeros(blocks, dtype))
    else:
        zeros = t.builder.weight(
            f"{base}.zeros", torch.uint8, blocks.zero_shape, lambda: weight.zeros(blocks)
        )
    return [scales, zeros]


def _matmul_nbits(t: Translation, x: Value, inputs: list[str], blocks: Blocks) -> str:
    return t.call(
        "MatMulNBits",
        [x.name, *inputs],
        domain=CONTRIB,
        K=blocks.columns,
        N=blocks.rows,
        bits=blocks.bits,
        block_size=blocks.block_size,
        accuracy_level=t.accuracy_level or None,
    )


def _linear_affine(t: Translation, call: Call) -> Value:
    return t.result(_affine_product(t, call)[0])


def _affine_product(t: Translation, call: Call) -> tuple[str, Blocks]:
    stored, names = _stored(t, call)
    x = t.tensor(call["x"])
    blocks = blocks_of(stored.spec, t.tensors[names["low"]].shape[0], stored.in_features)
    inputs = _affine_inputs(t, stored.spec, names, blocks, x.dtype)
    return _add_bias(t, _matmul_nbits(t, x, inputs, blocks), call.get("bias"), x.dtype), blocks


def _linear_affine_gated(t: Translation, call: Call) -> Value:
    product, blocks = _affine_product(t, call)
    result = t.result("")
    both = Value(product, result.dtype, (*result.shape[:-1], blocks.rows))
    axis, half = len(both.shape) - 1, blocks.rows // 2
    gate, up = t.slice(both, axis, 0, half).name, t.slice(both, axis, half, blocks.rows).name
    if call["activation"] == "silu":
        activated = silu(t, gate)
    else:
        activated = gelu(t, gate, "tanh" if call["activation"] == "gelu_tanh" else "none")
    return t.result(t.call("Mul", [activated, up]))


def _embedding_affine(t: Translation, call: Call) -> Value:
    stored, names = _stored(t, call)
    result = t.result("")
    blocks = blocks_of(stored.spec, t.tensors[names["low"]].shape[0], stored.in_features)
    if blocks.columns % blocks.block_size or blocks.bits not in (4, 8):
        raise t.refuse(
            f"a table of {blocks.columns} columns in groups of {blocks.block_size} cannot be gathered"
        )
    weight, base = AffineWeight(stored.spec, names, blocks.columns, t.read), _base(names)
    # A matrix here and blocks in MatMulNBits, but the same bytes: a tied head shares them in the file.
    table = t.builder.weight(
        f"{base}.table",
        torch.uint8,
        (blocks.rows, blocks.columns * blocks.bits // 8),
        lambda: weight.codes(blocks),
        data=f"{base}.codes",
    )
    scales, zeros = _affine_statistics(t, weight, base, blocks, result.dtype)
    return t.result(
        t.call(
            "GatherBlockQuantized",
            [table, t.tensor(call["ids"]).name, scales, zeros],
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            bits=blocks.bits,
            block_size=blocks.block_size,
        )
    )


def _linear_int8(t: Translation, call: Call) -> Value:
    stored, names = _stored(t, call)
    if stored.spec.outlier_threshold is not None:
        t.notes.add(LLM_INT8_NOTE)
    x, base = t.tensor(call["x"]), _base(names)
    blocks = blocks_of(stored.spec, t.tensors[names["codes"]].shape[0], stored.in_features)

    def scales() -> torch.Tensor:
        return t.read(names["scales"])[:, None].expand(-1, blocks.count).to(x.dtype).contiguous()

    inputs = [
        t.builder.weight(
            f"{base}.codes", torch.uint8, blocks.code_shape, lambda: pack_int8(t.read(names["codes"]), blocks)
        ),
        t.builder.weight(f"{base}.scales", x.dtype, (blocks.rows, blocks.count), scales),
    ]
    return t.result(_add_bias(t, _matmul_nbits(t, x, inputs, blocks), call.get("bias"), x.dtype))


def _linear_lut4(t: Translation, call: Call) -> Value:
    stored, names = _stored(t, call)
    spec, columns = stored.spec, stored.in_features
    x = t.tensor(call["x"])
    rows = t.tensors[names["codes"]].shape[0]
    # Weights side by side keep their own blocks: one operator does only where no block would be cut.
    crossing = columns % spec.block_size != 0
    cut = crossing and "part_rows" in names and not t.dry
    parts = [int(count) for count in t.read(names["part_rows"])] if cut else [rows]
    products, row, block = [], 0, 0
    for index, count in enumerate(parts):
        blocks = num_blocks(spec.block_size, count, columns)
        products.append(_matmul_bnb4(t, x, spec, names, (row, count), (block, blocks), columns, index))
        row, block = row + count, block + blocks
    name = products[0] if len(products) == 1 else t.call("Concat", products, axis=-1)
    return t.result(_add_bias(t, name, call.get("bias"), x.dtype))


def _matmul_bnb4(
    t: Translation,
    x: Value,
    spec: Any,
    names: dict[str, str],
    rows: tuple[int, int],
    blocks: tuple[int, int],
    columns: int,
    index: int,
) -> str:
    """One product; `rows` and `blocks` are (first, count) of the part of the stored weight."""
    base = _base(names) if index == 0 else f"{_base(names)}.part{index}"

    def codes() -> torch.Tensor:
        return t.read(names["codes"])[rows[0] : rows[0] + rows[1]].reshape(-1)

    def absmax() -> torch.Tensor:
        tensors = {part: t.read(name) for part, name in names.items()}
        _, values = LUT4.unpack(spec, tensors, columns)
        return values[blocks[0] : blocks[0] + blocks[1]].to(x.dtype)

    inputs = [
        t.builder.weight(f"{base}.codes", torch.uint8, (rows[1] * columns // 2,), codes),
        t.builder.weight(f"{base}.absmax", x.dtype, (blocks[1],), absmax),
    ]
    return t.call(
        "MatMulBnb4",
        [x.name, *inputs],
        domain=CONTRIB,
        K=columns,
        N=rows[1],
        block_size=spec.block_size,
        quant_type=_BNB4_TYPES[spec.quant_type],
    )


OPERATORS: dict[str, Callable[[Translation, Call], Any]] = {
    "qcompiler.linear_affine.default": _linear_affine,
    "qcompiler.linear_affine_gated.default": _linear_affine_gated,
    "qcompiler.embedding_affine.default": _embedding_affine,
    "qcompiler.linear_int8.default": _linear_int8,
    "qcompiler.linear_llm_int8.default": _linear_int8,
    "qcompiler.linear_lut4.default": _linear_lut4,
}
