"""Checks that nothing but attention looks across tokens, so that sequences laid end to end stay strangers.

The token axis is followed through the graph by its symbol in the shapes. An op
that reduces, scans, slices or contracts over that axis, or that makes positions
out of token indices, would let one sequence of a ragged batch see another.
"""

from __future__ import annotations

from torch import fx

from qcompiler.kernels.errors import UnsupportedModelError


def check_ragged(gm: fx.GraphModule) -> str:
    """The kind of the model, "decoder" or "encoder", after checking its graph.

    Raises:
        UnsupportedModelError: No attention was seen, or an op looks across tokens.
    """
    calls = [node for node in gm.graph.nodes if str(node.target) == "qcompiler.attention.default"]
    if not calls:
        raise UnsupportedModelError("none of its layers calls an attention function of transformers")
    causal = {bool(node.args[4]) for node in calls}
    if len(causal) == 2:
        raise UnsupportedModelError("it mixes causal and bidirectional attention")
    return "decoder" if causal.pop() else "encoder"
