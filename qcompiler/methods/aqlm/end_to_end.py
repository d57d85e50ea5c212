"""The optional last phase: codebooks, scales and norms of all blocks against the original's predictions.

Blocks tuned one by one do not know what their errors do to the output. Here the
loss is KL(original ‖ quantized) over the calibration windows, through the whole
graph at once, so that memory is that of one training step of the float model on
one window. The AQLM authors publish their best checkpoints after such a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule, Node

from qcompiler.calibration.blocks import Linear, cut_blocks, run_nodes
from qcompiler.calibration.runner import Calibration
from qcompiler.kernels.formats.additive import ADDITIVE, AdditiveSpec
from qcompiler.methods.aqlm.finetune import FinetuneSettings, tune
from qcompiler.methods.aqlm.layer import Fitted


def fitted_from(spec: AdditiveSpec, tensors: dict[str, torch.Tensor], in_features: int) -> Fitted:
    """A stored linear as what can be tuned."""
    codes, books, scales = ADDITIVE.unpack(spec, tensors, in_features)
    return Fitted(codes.long(), books[0].float(), scales.float(), in_features, 0.0)


def tune_end_to_end(
    gm: GraphModule,
    load: Callable[[str], torch.Tensor],
    calibration: Calibration,
    windows: Sequence[torch.Tensor],
    settings: FinetuneSettings,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, float]]:
    """Tune all blocks together.

    Args:
        gm: The captured graph.
        load: Checkpoint tensor by name, for attributes that are meta.
        calibration: The quantized blocks.
        windows: int64 [1, T] each.
        settings: How.
        device: Where to compute.
        seed: For the order of the windows.

    Returns:
        Stored tensors by linear, tuned float tensors by name, and the loss before and after.
    """
    device = torch.device(device)
    linears = {linear.name: linear for block in cut_blocks(gm)[1] for linear in block.linears}
    linears = {name: linear for name, linear in linears.items() if name in calibration.specs}
    fitted = {name: _fitted(calibration, linear, device) for name, linear in linears.items()}
    original = _float_tensors(gm, load, device)
    vectors = {name: calibration.parameter(name).to(device) for name in calibration.parameters}
    logits = _logits_of(gm, device)

    def loss(window: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            wanted = torch.log_softmax(logits(windows[window], original.__getitem__), -1)
        found = torch.log_softmax(logits(windows[window], lambda n: weights.get(n, original.get(n))), -1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    names = {name: linear.weight for name, linear in linears.items()}
    tuned, moved, info = tune(loss, len(windows), fitted, names, vectors, settings, seed)
    stored = {
        name: ADDITIVE.pack(calibration.specs[name], layer.codes, layer.codebooks, layer.scales)
        for name, layer in tuned.items()
    }
    return stored, {**vectors, **moved}, info


def _fitted(calibration: Calibration, linear: Linear, device: torch.device) -> Fitted:
    tensors = {part: tensor.to(device) for part, tensor in calibration.tensors(linear.name).items()}
    return fitted_from(calibration.specs[linear.name], tensors, linear.in_features)


def _float_tensors(
    gm: GraphModule, load: Callable[[str], torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    tensors = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            held = getattr(gm.get_submodule(path), leaf)
            tensor = (load(str(node.target)) if held.is_meta else held).to(device)
            tensors[str(node.target)] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _logits_of(gm: GraphModule, device: torch.device) -> Callable[..., torch.Tensor]:
    nodes = list(gm.graph.nodes)
    calls = [node for node in nodes if node.op == "call_function"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    output = nodes[-1].args[0]
    dtypes = dict.fromkeys((torch.bfloat16, torch.float16), torch.float32)

    def logits(ids: torch.Tensor, fetch: Callable[[str], torch.Tensor]) -> torch.Tensor:
        rows = {"input_ids": ids[0], "position_ids": torch.arange(ids.shape[1])}
        zeros = torch.zeros_like(ids[0])
        given: dict[Node, torch.Tensor] = {
            node: rows.get(str(node.target), zeros)[None].to(device) for node in inputs
        }
        return run_nodes(calls, given, fetch, [output], dtypes=dtypes, device=device)[output][0].float()

    return logits
