"""A quantized KV cache chosen at load: a decoder's graph with a plain cache, rewritten for another format.

What `qcompile --kv-bits` leaves in an artifact's graph, for artifacts that were
compiled without it. The formats are those of `kernels/formats/kv_cache.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.kv_cache import KVFormat, kv_format
from qcompiler.kernels.kv_bits import kv_format_of_bits
from qcompiler.runtime.graph import Graph, Input, Node, Ref, bind

_APPENDS = ("qcompiler.kv_append", "qcompiler.rotary_kv_append")
_ATTEND = "qcompiler.paged_attention"
_PLAIN = tuple(f"{append}.default" for append in _APPENDS)


def with_kv_bits(graph: Graph, bits: str | int | None) -> Graph:
    """The graph with a KV cache of so many bits.

    Args:
        graph: A decoder, as it stands in the artifact.
        bits: "16", "8", "4" or "fp8"; None leaves the cache as it is.

    Raises:
        InvalidInputError: the model has no cache, or one that is quantized otherwise already.
    """
    if bits is None:
        return graph
    name = kv_format_of_bits(bits)
    quantized = [f"{append}_quantized.default" for append in _APPENDS]
    present = {bind(node)["format"] for node in graph.nodes if node.op in quantized}
    if present:
        if present != {name}:
            raise InvalidInputError(
                f"kv_bits {bits} was given, but the artifact was compiled with a cache of {min(present)}",
                hint="Drop --kv-bits, or compile the model without it to choose at load.",
            )
        return graph
    if name is None:
        return graph
    if not any(node.op in _PLAIN for node in graph.nodes):
        raise InvalidInputError(f"kv_bits {bits} was given, but the model has no KV cache")
    return _rewrite(graph, kv_format(name))


def _rewrite(graph: Graph, chosen: KVFormat) -> Graph:
    declared = {item.name: item for item in graph.inputs}
    inputs: list[Input] = []
    for item in graph.inputs:
        if item.name.startswith(("k_pages_", "v_pages_")):
            pages, page_size, heads, width = item.shape
            words = Input(item.name, "int16", (pages, page_size, heads, chosen.words(int(width))))
            row = (pages, page_size, *chosen.scale_row(int(heads)))
            scales = Input(_scales(item.name), str(chosen.scale_dtype).removeprefix("torch."), row)
            inputs += [words, scales]
        else:
            inputs.append(item)
    written = graph.written | {
        f"input {_scales(name)}" for name in declared if name.startswith(("k_pages_", "v_pages_"))
    }
    nodes = [_node(node, declared, chosen) for node in graph.nodes]
    return Graph(graph.kind, inputs, graph.weights, nodes, graph.outputs, written)


def _node(node: Node, declared: dict[str, Input], chosen: KVFormat) -> Node:
    if node.op not in (*_PLAIN, f"{_ATTEND}.default"):
        return node
    call = bind(node)
    pages = [call.pop("k_pages"), call.pop("v_pages")]
    scales = [Ref(_scales(item.name)) for item in pages]
    if node.op in _PLAIN:
        given = list(call.values())  # slots, and what may stand behind them, come after the pages
        at = list(call).index("slots")
        args = (*given[:at], *pages, *scales, *given[at:], chosen.name)
        rotating = node.op == _PLAIN[1]
        ops = torch.ops.qcompiler
        target = ops.rotary_kv_append_quantized.default if rotating else ops.kv_append_quantized.default
    else:
        q, block_table, query_start, seq_lens, max_query_len, *options = call.values()
        channels = declared[pages[1].name].shape[3]
        metadata = (block_table, query_start, seq_lens, max_query_len)
        args = (q, *pages, *scales, *metadata, channels, chosen.name, *options)
        target = torch.ops.qcompiler.paged_attention_quantized.default
    return replace(node, op=str(target), target=target, args=args, kwargs={})


def _scales(pages: str) -> str:
    return pages.replace("_pages_", "_scales_")
