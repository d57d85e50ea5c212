"""Quality of a planned artifact: both models over the same text, weights streamed, one pass each."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from qcompiler.data import default_text
from qcompiler.evaluation import StreamedProgram
from qcompiler.kernels.errors import InvalidInputError
from qcompiler.passes import GatherLogitsRows, InsertRagged, PassManager
from qcompiler.plan import CompilePlan
from qcompiler.progress import Progress
from qcompiler.quality import Quality, QualityMeter
from qcompiler.quantize_weights import WeightStream


def measure_quality(plan: CompilePlan, stream: WeightStream, progress: Progress) -> Quality | None:
    """KL divergence, top-1 agreement, perplexities on the evaluation text; None where they have no meaning.

    Both models run in the artifact's dtype: what is deployed is what is measured.
    """
    options = plan.options
    if options.eval_tokens == 0:
        return None
    if plan.captured.kind != "decoder":
        progress.note("quality was not measured: perplexity and KL are figures of decoders")
        return None
    tokens = evaluation_tokens(plan)
    if tokens is None:
        progress.note("quality was not measured: the checkpoint has no tokenizer.json")
        return None
    original = _program(plan, plan.captured.graph, stream)
    compiled = _program(plan, plan.quantized_graph, stream)
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


def evaluation_tokens(plan: CompilePlan) -> torch.Tensor | None:
    """The first `eval_tokens` tokens of the evaluation text, int64 [tokens]; None without a tokenizer.

    Raises:
        InvalidInputError: The text is not UTF-8, or shorter than two tokens.
    """
    from tokenizers import Tokenizer

    path = plan.file("tokenizer.json")
    if path is None:
        return None
    text = read_text(plan.options.eval_text) if plan.options.eval_text else default_text("eval")
    # A token is at least one byte or so; encoding no more than is needed keeps large files cheap.
    excerpt = text[: 16 * plan.options.eval_tokens]
    ids = (
        Tokenizer.from_file(str(path))
        .encode(excerpt, add_special_tokens=False)
        .ids[: plan.options.eval_tokens]
    )
    if len(ids) < 2:
        raise InvalidInputError(f"the evaluation text has {len(ids)} tokens; at least 2 are needed")
    return torch.tensor(ids, dtype=torch.int64)


def read_text(path: Path) -> str:
    """A text file as UTF-8.

    Raises:
        InvalidInputError: It is not.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


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


def _program(plan: CompilePlan, graph: GraphModule, stream: WeightStream) -> StreamedProgram:
    lowered = copy.deepcopy(graph)
    PassManager([GatherLogitsRows(), InsertRagged()]).run(lowered)

    def fetch(name: str) -> torch.Tensor:
        return stream.tensor(lowered, name).to(plan.device)

    return StreamedProgram(lowered, fetch, plan.device)
