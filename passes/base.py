"""What a pass is: a named rewrite of an FX graph that says how often it matched and why it did not elsewhere.

Matchers are written by hand on canonical ops. A pass leaves a graph that lints
and runs: dead nodes and the parameters they alone used are gone, and every new
node carries its fake value in `meta["val"]`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch.fx import GraphModule, Node

from qcompiler.kernels.errors import InvalidInputError, PassError
from qcompiler.passes.graph_utils import drop_unused_attributes

# Version (major, minor) of what `qcompiler.passes` exports: the major one is raised when a name goes or a
# meaning changes, the minor one when something is added.
API_VERSION = (1, 1)


class Skip(NamedTuple):
    """A place where a pass could have matched but did not."""

    node: str
    reason: str


@dataclass
class PassResult:
    """What one run of a pass did.

    Attributes:
        name: The pass.
        matched: Rewrites made; 0 means that the graph is unchanged.
        skipped: (node name, reason) of near misses.
        seconds: Wall time, clean-up and lint included.
        nodes_before: Nodes in the graph before the run.
        nodes_after: Nodes in the graph after it.
        launches_saved: Kernels that a run of the graph no longer launches, where a pass knows.
        bytes_saved: Of activations, per token and run, that are no longer written and read back.
    """

    name: str
    matched: int = 0
    skipped: list[Skip] = field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    launches_saved: int = 0
    bytes_saved: int = 0

    def skip(self, node: Node | str, reason: str) -> None:
        """Note why `node` was left as it is."""
        self.skipped.append(Skip(node if isinstance(node, str) else node.name, reason))


class Pass(ABC):
    """Base of all passes; a subclass implements `apply`.

    Attributes:
        name: Short snake_case name, used in reports and dumps.
        required: The pass manager raises `PassError` when the pass matches nothing.
        changes_numerics: True if results may differ by more than the rounding of a fused kernel.
        api: The `API_VERSION` that the pass was written for; a pass from another package pins it.
    """

    name: ClassVar[str]
    api: ClassVar[tuple[int, int]] = API_VERSION
    required: bool = False
    changes_numerics: ClassVar[bool] = False

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrite `gm` in place.

        Args:
            gm: Any FX graph of aten and `qcompiler::` ops with `meta["val"]` on its nodes,
                e.g. `torch.export.export(...).module()`.

        Returns:
            The counts and reasons.

        Raises:
            PassError: The rewritten graph does not lint (our fault).
        """
        started = time.perf_counter()
        result = self.new_result()
        result.nodes_before = len(gm.graph.nodes)
        self.apply(gm, result)
        if result.matched:
            try:
                gm.graph.eliminate_dead_code()
                drop_unused_attributes(gm)
                gm.graph.lint()
            except (RuntimeError, AssertionError) as error:
                raise PassError(f"{self.name}: the rewritten graph does not lint: {error}") from error
            gm.recompile()
        result.nodes_after = len(gm.graph.nodes)
        result.seconds = time.perf_counter() - started
        return result

    def new_result(self) -> PassResult:
        """An empty result; passes that report more override this."""
        return PassResult(self.name)

    @abstractmethod
    def apply(self, gm: GraphModule, result: PassResult) -> None:
        """Rewrite `gm.graph`, counting into `result`; dead code is removed afterwards."""


def check_api(item: Pass) -> None:
    """Refuse a pass that was written for another major version, or for a later minor one.

    Raises:
        InvalidInputError: Names the pass and both versions.
    """
    major, minor = item.api
    if major != API_VERSION[0] or minor > API_VERSION[1]:
        raise InvalidInputError(
            f"pass {item.name} was written for qcompiler.passes {major}.{minor}; "
            f"this is {API_VERSION[0]}.{API_VERSION[1]}",
            hint="Install the qcompiler that it was written for, or adapt the pass (docs/passes.md).",
        )
