"""Quality of a planned artifact: both models over the same text, weights streamed, one pass each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.evaluation import StreamedProgram
from qcompiler.passes import GatherLogitsRows, InsertRagged, PassManager
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.quality import Quality, QualityMeter
from qcompiler.quantize_weights import WeightStream
from qcompiler.texts import text_tokens


def measure_quality(plan: CompilePlan, stream: WeightStream, progress: Progress) -> Quality | None:
    """KL divergence, top-1 agreement, perplexities on the evaluation text; None where they have no meaning.

    Both models run in the artifact's dtype, the compiled one with keys and values as its cache gives them
    back: what is deployed is what is measured.
    """
    options = plan.options
    if options.eval_tokens == 0:
        return None
    if plan.captured.kind != "decoder":
        progress.note("quality was not measured: perplexity and KL are figures of decoders")
        return None
    tokens = text_tokens(plan, options.eval_text, "eval", options.eval_tokens)
    if tokens is None:
        progress.note("quality was not measured: the checkpoint has no tokenizer.json")
        return None
    original = _program(plan, plan.captured.graph, stream.original)
    compiled = _program(plan, plan.quantized_graph, stream.tensor, options.kv_format)
    inputs, rows, targets = windows(tokens.to(plan.device), options.eval_context)
    meter = QualityMeter()
    with progress.stage("evaluate", original.node_count() + compiled.node_count()) as advance:
        pairs = zip(
            original.logits(inputs, rows, lambda: advance("")),
            compiled.logits(inputs, rows, lambda: advance("")),
            targets,
            strict=True,
        )
        for before, after, wanted in pairs:
            meter.update(before, after, wanted)
    return meter.result()


def windows(
    tokens: torch.Tensor, context: int
) -> tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]:
    """Cut a text [tokens] into windows laid end to end as one ragged batch.

    Returns:
        Graph inputs; per window the rows that predict a next token inside it; and those tokens.
        A last window of one token predicts nothing and is left out.
    """
    count = tokens.numel() - (tokens.numel() % context == 1)
    tokens = tokens[:count]
    device = tokens.device
    starts = [*range(0, count, context), count]
    inputs = {
        "input_ids": tokens[None],
        "position_ids": (torch.arange(count, device=device) % context)[None],
        "query_start": torch.tensor(starts, dtype=torch.int32, device=device),
        "max_query_len": min(context, count),
    }
    rows = [torch.arange(a, b - 1, device=device) for a, b in pairwise(starts)]
    return inputs, rows, [tokens[part + 1] for part in rows]


def _program(
    plan: CompilePlan,
    graph: GraphModule,
    tensor_of: Callable[[GraphModule, str], torch.Tensor],
    kv_format: str | None = None,
) -> StreamedProgram:
    lowered = copy.deepcopy(graph)
    PassManager([GatherLogitsRows(), InsertRagged(kv_format)]).run(lowered)

    def fetch(name: str) -> torch.Tensor:
        return tensor_of(lowered, name).to(plan.device)

    return StreamedProgram(lowered, fetch, plan.device)
