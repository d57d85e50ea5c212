"""Graph passes: FX graph in, FX graph out; they import the kernels' floor and nothing above.

`canonical_passes()` make any exported graph readable to the rest, in one form
per idea; `lowering_passes()` make it what the runtime executes. What `__all__`
names is the public interface, at `API_VERSION`.
"""

from __future__ import annotations

import torch

from qcompiler.passes.addmm_to_linear import AddmmToLinear
from qcompiler.passes.base import API_VERSION, Pass, PassResult, Skip
from qcompiler.passes.cleanup import InlineSubgraphs, RemoveAsserts, RemoveNoOps
from qcompiler.passes.common_subexpressions import MergeCommonSubexpressions
from qcompiler.passes.functionalize import Functionalize
from qcompiler.passes.fuse_add_norm import FuseAddNorm
from qcompiler.passes.fuse_gated_activation import FuseGatedActivation
from qcompiler.passes.fuse_gated_linears import FuseGatedLinears
from qcompiler.passes.fuse_layer_norm import FuseLayerNorm
from qcompiler.passes.fuse_rms_norm import FuseRMSNorm
from qcompiler.passes.fuse_rotary import FuseRotary
from qcompiler.passes.fuse_rotary_append import FuseRotaryAppend
from qcompiler.passes.fuse_sibling_linears import FuseSiblingLinears
from qcompiler.passes.gather_logits_rows import GatherLogitsRows
from qcompiler.passes.graph_text import graph_text
from qcompiler.passes.graph_utils import argument, calls, insert_attribute, insert_call, is_parameter, replace
from qcompiler.passes.insert_paged_kv_cache import InsertPagedKVCache, InsertRagged
from qcompiler.passes.manager import PassManager
from qcompiler.passes.quantize_embeddings import QuantizeEmbeddings
from qcompiler.passes.quantize_linears import QuantizeLinears
from qcompiler.passes.quantized_weights import QuantizedLinear, QuantizeResult
from qcompiler.passes.select_kernels import SelectKernels
from qcompiler.passes.weights import (
    Concat,
    ExpertRows,
    Loaded,
    Quantized,
    Recipe,
    Zeros,
    resolve,
    sources,
    weight_recipes,
)

__all__ = [
    "API_VERSION",
    "AddmmToLinear",
    "Concat",
    "ExpertRows",
    "Functionalize",
    "FuseAddNorm",
    "FuseGatedActivation",
    "FuseGatedLinears",
    "FuseLayerNorm",
    "FuseRMSNorm",
    "FuseRotary",
    "FuseRotaryAppend",
    "FuseSiblingLinears",
    "GatherLogitsRows",
    "InlineSubgraphs",
    "InsertPagedKVCache",
    "InsertRagged",
    "Loaded",
    "MergeCommonSubexpressions",
    "Pass",
    "PassManager",
    "PassResult",
    "QuantizeEmbeddings",
    "QuantizeLinears",
    "QuantizeResult",
    "Quantized",
    "QuantizedLinear",
    "Recipe",
    "RemoveAsserts",
    "RemoveNoOps",
    "SelectKernels",
    "Skip",
    "Zeros",
    "argument",
    "calls",
    "canonical_passes",
    "graph_text",
    "insert_attribute",
    "insert_call",
    "is_parameter",
    "lowering_passes",
    "replace",
    "resolve",
    "sources",
    "weight_recipes",
]


def canonical_passes() -> list[Pass]:
    """From any exported graph to canonical ops, in order; none is required to match."""
    return [
        InlineSubgraphs(),
        RemoveAsserts(),
        Functionalize(),
        RemoveNoOps(),
        MergeCommonSubexpressions(),
        AddmmToLinear(),
        FuseLayerNorm(),  # before RMSNorm, which would take a centred tensor for its input
        FuseRMSNorm(),
        FuseRotary(),
        FuseGatedActivation(),
    ]


def lowering_passes(
    kind: str = "decoder",
    *,
    kv_dtype: torch.dtype | None = None,
    kv_format: str | None = None,
    fuse: bool = True,
) -> list[Pass]:
    """From canonical (and quantized) ops to the graph that the runtime executes, in order.

    Args:
        kind: "decoder" (paged KV cache, logits of chosen rows) or "encoder" (ragged, every row).
        kv_dtype: Element type of the cache's pages; that of k and v if None.
        kv_format: Format of a quantized cache; it changes numerics.
        fuse: Join ops into fewer launches.
    """
    side_by_side: list[Pass] = [FuseSiblingLinears(), FuseAddNorm()] if fuse else []
    if kind == "encoder":
        return [*side_by_side, InsertRagged(), *([FuseGatedLinears()] if fuse else [])]
    return [
        *side_by_side,
        GatherLogitsRows(),
        InsertPagedKVCache(kv_dtype=kv_dtype, kv_format=kv_format),
        *([FuseRotaryAppend(), FuseGatedLinears()] if fuse else []),
    ]
