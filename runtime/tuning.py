"""The linears of an artifact whose kernels can be tuned, for `qrun tune`."""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.formats.base import TensorSpec
from qcompiler.kernels.formats.calls import stored_weight
from qcompiler.kernels.tuning.linear_cases import TUNED, Case
from qcompiler.kernels.tuning.tune import Weight
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.graph import bind


def tunable_linears(artifact: Artifact) -> list[Weight]:
    """Distinct linears, as format, out_features and in_features, in the order of the graph.

    Raises:
        InvalidInputError: It has none, or its activations are float32, for which nothing is tuned.
    """
    if artifact.dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInputError(
            f"activations are {artifact.manifest.dtype}: only kernels of 16-bit activations are tuned",
            hint="Compile with --dtype bfloat16.",
        )

    def describe(argument: Any) -> TensorSpec:
        entry = artifact.tensors.entries[argument.name]
        return TensorSpec(tuple(entry.shape), entry.dtype)

    found: dict[Weight, None] = {}
    for node in artifact.graph.nodes:
        op = node.op.removeprefix("qcompiler.").removesuffix(".default")
        if not op.startswith("linear_"):
            continue
        weight = stored_weight(op, bind(node), describe)
        if weight is None or not isinstance(weight.spec, TUNED):  # a plug-in's format
            continue
        case = Case(weight.spec.name, weight.spec, artifact.dtype)
        rows = describe(next(iter(weight.tensors.values()))).shape[0]
        if case.key(rows, weight.in_features, 1) is not None:
            found[Weight(case, rows, weight.in_features)] = None
    if not found:
        raise InvalidInputError(
            "the artifact has no linear whose kernel has configurations to choose from",
            hint=f"Tuning is for linears of the formats {', '.join(sorted(spec.name for spec in TUNED))}.",
        )
    return list(found)
