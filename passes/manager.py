"""Runs an explicit ordered list of passes: times and counts each, and can dump the graph after each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch.fx import GraphModule

from qcompiler.kernels.errors import InvalidInputError, PassError
from qcompiler.passes.base import Pass, PassResult, check_api
from qcompiler.passes.graph_text import graph_text

logger = logging.getLogger(__name__)


class PassManager:
    """An ordered list of passes.

    Args:
        passes: Run in this order.
        dump_dir: Folder for readable graphs: `000_captured.txt`, then `001_<pass>.txt` after each
            pass, so that the text before a pass is the file before it. Made if missing.

    Raises:
        InvalidInputError: A pass was written for another version of this package.
    """

    def __init__(self, passes: Sequence[Pass], dump_dir: str | Path | None = None):
        self.passes = list(passes)
        for item in self.passes:
            check_api(item)
        self.dump_dir = None if dump_dir is None else Path(dump_dir)

    def run(self, gm: GraphModule) -> list[PassResult]:
        """Run every pass on `gm` in place.

        Returns:
            One result per pass, in order.

        Raises:
            InvalidInputError: `gm` is no graph module.
            PassError: A required pass matched nothing, or a pass broke the graph.
        """
        if not isinstance(gm, GraphModule):
            raise InvalidInputError(
                f"passes run on a torch.fx.GraphModule, not on {type(gm).__name__}",
                hint="An ExportedProgram gives one: program.module(). A module is exported first.",
            )
        self._dump(gm, 0, "captured", None)
        results: list[PassResult] = []
        for index, item in enumerate(self.passes, start=1):
            result = item.run(gm)
            results.append(result)
            self._dump(gm, index, item.name, result)
            logger.debug(
                "%s: %d matched, %d skipped, %d → %d nodes, %.3f s",
                result.name, result.matched, len(result.skipped), result.nodes_before, result.nodes_after,
                result.seconds,
            )  # fmt: skip
            if item.required and not result.matched:
                raise PassError(f"{item.name}: matched nothing in this graph{_why(result)}", hint=_HINT)
        return results

    def _dump(self, gm: GraphModule, index: int, name: str, result: PassResult | None) -> None:
        if self.dump_dir is None:
            return
        self.dump_dir.mkdir(parents=True, exist_ok=True)
        (self.dump_dir / f"{index:03d}_{name}.txt").write_text(graph_text(gm, result), encoding="utf-8")


_HINT = "Dump the graphs to see what it looked for and what stands there, or leave the pass out."


def _why(result: PassResult) -> str:
    if not result.skipped:
        return " (nothing resembling its pattern)"
    reasons: dict[str, list[str]] = {}
    for node, reason in result.skipped:
        reasons.setdefault(reason, []).append(node)
    return ": " + "; ".join(
        f"{reason} ({nodes[0]}{f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''})"
        for reason, nodes in list(reasons.items())[:5]
    )
