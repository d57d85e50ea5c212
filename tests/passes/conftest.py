"""What the pass tests share: small exports, tiny captured models, lowered graphs run step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx import GraphModule

from qcompiler.capture.export import capture
from qcompiler.capture.matrix import SUPPORTED, eager_model
from qcompiler.capture.source import ModelSource
from qcompiler.passes import InlineSubgraphs, RemoveAsserts, RemoveNoOps
from qcompiler.passes.weights import recipe_of, resolve

PAGE_SIZE = 4


def export(module: torch.nn.Module, *inputs: torch.Tensor, dynamic: int | None = None) -> GraphModule:
    """Someone else's graph: plain torch.export; dimension `dynamic` of every input is symbolic."""
    shapes = None
    if dynamic is not None:
        tokens = torch.export.Dim("T", min=1, max=4096)
        shapes = tuple({dynamic: tokens} for _ in inputs)
    gm = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False).module()
    for item in (InlineSubgraphs(), RemoveAsserts(), RemoveNoOps()):
        item.run(gm)
    return gm


def ops(gm: GraphModule) -> Counter[str]:
    """How often each op stands in the graph."""
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def check_run(item: Any, gm: GraphModule, *inputs: torch.Tensor, matched: int) -> tuple[Any, float]:
    """Run a pass and check what holds for every pass.

    The count is as said; every node has a value; a second run matches nothing and changes nothing.

    Returns:
        The result, and the largest difference of the output relative to its largest magnitude.
    """
    with torch.no_grad():
        before = gm(*inputs)
        result = item.run(gm)
        after = gm(*inputs)
    assert result.matched == matched, (result, gm.graph)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op not in ("output", "call_module"))
    code = str(gm.graph)
    assert item.run(gm).matched == 0
    assert str(gm.graph) == code
    assert after.dtype == before.dtype
    return result, difference(after, before)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude."""
    assert got.shape == wanted.shape
    return ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def family(name: str, **options: Any) -> SimpleNamespace:
    """A tiny model of the support matrix: captured graph on meta, and its eager twin with weights."""
    row = next(row for row in SUPPORTED if row.name == name)
    config = row.config()
    for key, value in options.items():
        setattr(config, key, value)
    source = ModelSource.from_config(config)
    captured = capture(source, torch.float32)
    model = eager_model(source)
    return SimpleNamespace(graph=captured.graph, kind=captured.kind, model=model, weights=model.state_dict())


class RecipeRunner(fx.Interpreter):
    """Runs a rewritten graph; weights on meta come from the checkpoint by their recipes."""

    def __init__(
        self, gm: GraphModule, weights: dict[str, torch.Tensor], quantize: Callable[..., Any] | None = None
    ):
        super().__init__(gm)
        self.weights, self.quantize = weights, quantize
        self.loaded: dict[str, torch.Tensor] = {}

    def fetch_attr(self, target: str) -> Any:
        if target not in self.loaded:
            held = super().fetch_attr(target)
            if held.is_meta:
                made = resolve(recipe_of(self.module, target), self.weights.__getitem__, self.quantize)
                assert made.shape == held.shape
                assert made.dtype == held.dtype
                held = made
            self.loaded[target] = held
        return self.loaded[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu)
        return super().call_function(target, args, kwargs)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


class Sequences:
    """A paged cache for a lowered decoder, and the steps that fill it."""

    def __init__(
        self, gm: GraphModule, runner: RecipeRunner, prompts: Sequence[torch.Tensor], max_len: int = 40
    ):
        self.runner = runner
        self.tokens = [prompt.tolist() for prompt in prompts]
        self.done = [0] * len(prompts)
        self.per_sequence = -(-max_len // PAGE_SIZE)
        pages = self.per_sequence * len(prompts)
        shuffled = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        self.table = shuffled.view(len(prompts), self.per_sequence).to(torch.int32)
        self.names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
        self.pages = {
            n.target: torch.full(
                (pages, PAGE_SIZE, *n.meta["val"].shape[2:]), torch.nan, dtype=n.meta["val"].dtype
            )
            for n in gm.graph.nodes
            if n.op == "placeholder" and n.target.startswith(("k_pages", "v_pages"))
        }

    @torch.no_grad()
    def step(self, counts: Sequence[int]) -> torch.Tensor:
        """Feed the next `counts[s]` tokens of each sequence; logits [live, V] of their last rows."""
        ids, positions, slots, rows, starts = [], [], [], [], [0]
        for s, count in enumerate(counts):
            for position in range(self.done[s], self.done[s] + count):
                ids.append(self.tokens[s][position])
                positions.append(position)
                page = int(self.table[s, position // PAGE_SIZE])
                slots.append(page * PAGE_SIZE + position % PAGE_SIZE)
            self.done[s] += count
            starts.append(len(ids))
            if count:
                rows.append(len(ids) - 1)
        values = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "logits_rows": torch.tensor(rows),
            "slots": torch.tensor(slots),
            "block_table": self.table,
            "query_start": torch.tensor(starts, dtype=torch.int32),
            "seq_lens": torch.tensor(
                [d if c else 0 for d, c in zip(self.done, counts, strict=True)], dtype=torch.int32
            ),
            "max_query_len": max(counts),
            **self.pages,
        }
        return self.runner.run(*(values[name] for name in self.names))[0]


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers above by name."""
    return SimpleNamespace(
        export=export, ops=ops, check_run=check_run, difference=difference, family=family,
        RecipeRunner=RecipeRunner, Sequences=Sequences,
    )  # fmt: skip
