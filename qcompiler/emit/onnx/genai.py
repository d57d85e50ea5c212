"""genai_config.json: what onnxruntime-genai must know of a decoder."""

from __future__ import annotations

from typing import Any

from qcompiler.emit.onnx.attention import MASK, past_name, present_name
from qcompiler.emit.onnx.files import MODEL
from qcompiler.emit.onnx.graph import OnnxGraph
from qcompiler.runtime.artifact import Artifact


def genai_config(artifact: Artifact, graph: OnnxGraph) -> dict[str, Any] | None:
    """The configuration, or None where onnxruntime-genai cannot say the caches: they differ by layer."""
    shapes = {(cache.heads, cache.key_size, cache.value_size) for cache in graph.caches}
    if len(shapes) != 1:
        return None
    ((kv_heads, head_size, value_size),) = shapes
    if head_size != value_size:
        return None
    model = artifact.manifest.model
    config = artifact.json("config.json") or {}
    generation = artifact.json("generation_config.json") or {}
    eos = list(model.eos_token_ids)
    pad = config.get("pad_token_id")
    heads, hidden = _sizes(artifact)
    return {
        "model": {
            "type": model.model_type,
            "vocab_size": model.vocab_size,
            "context_length": model.max_context,
            "bos_token_id": model.bos_token_id if model.bos_token_id is not None else (eos or [0])[0],
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": pad if isinstance(pad, int) else (eos or [0])[0],
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": head_size,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_hidden_layers": len(graph.caches),
                "num_key_value_heads": kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": MASK,
                    "position_ids": "position_ids",
                    "past_key_names": past_name("%d", "key"),
                    "past_value_names": past_name("%d", "value"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": present_name("%d", "key"),
                    "present_value_names": present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": model.max_context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
            "temperature": float(generation.get("temperature") or 1.0),
            "top_k": int(generation.get("top_k") or 50),
            "top_p": float(generation.get("top_p") or 1.0),
        },
    }


def _sizes(artifact: Artifact) -> tuple[int, int]:
    """Query heads and hidden size, as the graph has them."""
    heads = hidden = 0
    for node in artifact.graph.nodes:
        shape = node.shape or ()
        if node.op == "qcompiler.paged_attention.default" and isinstance(shape[1], int):
            heads = shape[1]
        if node.op in ("aten.embedding.default", "qcompiler.embedding_affine.default") and not hidden:
            hidden = shape[-1] if isinstance(shape[-1], int) else 0
    return heads, hidden
