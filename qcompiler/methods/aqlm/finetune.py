"""Fine-tuning of a block: codebooks, scales, norms and biases by Adam against what the block should give.

Optionally the codes move too, after PV-tuning (Malinovskii et al. 2024): a float
copy of each weight follows the straight-through gradient, and the groups whose
copy has gone farthest from their codewords take the nearest sum of codewords.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from qcompiler.calibration.task import BlockTask
from qcompiler.methods.aqlm.layer import Fitted
from qcompiler.methods.aqlm.search import choose_codes, sum_codewords
from qcompiler.methods.aqlm.sums import sums_of, tunable_sum


@dataclass(frozen=True)
class FinetuneSettings:
    """How a block is tuned.

    Attributes:
        epochs: Passes over the calibration windows; 0 switches fine-tuning off.
        batch: Windows per step.
        rate: Learning rate at the start, relative to the size of what it moves; falls to a tenth as a cosine.
        code_updates: How often codes are chosen anew, spread over the first three quarters; 0: never.
        code_share: Share of the groups whose codes may change each time.
        code_rate: Learning rate of the float copies, relative to the weight's root mean square.
        beam: Of the search of codes.
    """

    epochs: int = 4
    batch: int = 2
    rate: float = 1e-2
    code_updates: int = 0
    code_share: float = 0.05
    code_rate: float = 3e-2
    beam: int = 4


class _TunedLinear:
    """A fitted linear whose codebooks and scales require gradients."""

    def __init__(self, fitted: Fitted, moving: bool):
        self.fitted = fitted
        self.books = fitted.codebooks.clone().requires_grad_()
        self.log_scales = torch.zeros_like(fitted.scales).requires_grad_()
        self.copy = fitted.weight().requires_grad_() if moving else None
        self.sums = sums_of(fitted.codes, self.books.shape[1])

    def groups(self) -> torch.Tensor:
        """Sums of codewords [N, G, d], differentiable in the codebooks."""
        return tunable_sum(self.books, self.fitted.codes, self.sums)

    def scales(self) -> torch.Tensor:
        return self.fitted.scales * self.log_scales.exp()

    def weight(self) -> torch.Tensor:
        weight = (self.groups().flatten(1) * self.scales()[:, None])[:, : self.fitted.in_features]
        if self.copy is not None:
            weight = weight + (self.copy - self.copy.detach())
        return weight

    @torch.no_grad()
    def update_codes(self, share: float, beam: int) -> int:
        """Choose codes anew where the float copy has gone farthest; returns how many groups changed."""
        if self.copy is None:
            return 0
        scales = self.scales()[:, None]
        codes, books = self.fitted.codes, self.books.detach()
        padding = codes.shape[1] * books.shape[2] - self.fitted.in_features
        wanted = (F.pad(self.copy, (0, padding)) / scales).unflatten(1, (codes.shape[1], -1))
        held = sum_codewords(books, codes)
        if padding:
            wanted[:, -1, -padding:] = held[:, -1, -padding:]
        distance = ((wanted - held).square().sum(2) * scales.square()).flatten()
        chosen = distance.topk(max(1, int(share * distance.numel()))).indices
        flat = codes.flatten(0, 1)
        before = flat[chosen]
        after = choose_codes(wanted.flatten(0, 1)[chosen], books, beam, before)
        flat = flat.clone()
        flat[chosen] = after
        self.fitted.codes = flat.reshape(codes.shape)
        self.sums = sums_of(self.fitted.codes, books.shape[1])
        # The copy starts over from what now stands for the weight, or it would drift for good.
        self.copy.copy_(
            (sum_codewords(books, self.fitted.codes).flatten(1) * scales)[:, : self.fitted.in_features]
        )
        return int((after != before).any(1).sum())

    @torch.no_grad()
    def result(self) -> Fitted:
        return Fitted(
            self.fitted.codes, self.books.detach(), self.scales(), self.fitted.in_features, self.fitted.error
        )


def finetune(
    task: BlockTask, fitted: dict[str, Fitted], settings: FinetuneSettings
) -> tuple[dict[str, Fitted], dict[str, torch.Tensor], dict[str, float]]:
    """Tune a block.

    Args:
        task: The block.
        fitted: Its linears by name.
        settings: How.

    Returns:
        The linears, the tuned norms and biases by name, and the block's relative error before and after.
    """
    names = {name: linear.weight for name, linear in task.linears.items()}
    vectors = {name: task.weights[name] for name in task.tunable()}
    tuned = tune(partial(window_error, task), task.windows, fitted, names, vectors, settings, task.seed)
    task.tell(f"{task.name}: block error {tuned[2]['error_before']:.5f}, tuned {tuned[2]['error']:.5f}")
    return tuned


Loss = Callable[[int, dict[str, torch.Tensor]], torch.Tensor]


def tune(
    loss: Loss,
    windows: int,
    fitted: dict[str, Fitted],
    names: dict[str, str],
    vectors: dict[str, torch.Tensor],
    settings: FinetuneSettings,
    seed: int,
) -> tuple[dict[str, Fitted], dict[str, torch.Tensor], dict[str, float]]:
    """Minimise a loss over codebooks, scales and vectors (and codes, where the settings say so).

    Args:
        loss: (window, tensors by name) → the mean loss over that window.
        windows: How many windows there are.
        fitted: Linears by name.
        names: Linear → name of its weight.
        vectors: Float tensors to tune along, by name.
        settings: How.
        seed: For the order of the windows.

    Returns:
        The linears, the vectors, and figures; what was given where tuning did not lower the loss.
    """
    linears = {name: _TunedLinear(layer, settings.code_updates > 0) for name, layer in fitted.items()}
    moved = {name: vector.clone().requires_grad_() for name, vector in vectors.items()}

    def current() -> dict[str, torch.Tensor]:
        return {**moved, **{names[name]: layer.weight() for name, layer in linears.items()}}

    before = _mean_loss(loss, windows, current)
    info = {"error_before": before, "error": before}
    steps = settings.epochs * math.ceil(windows / settings.batch)
    if steps == 0:
        return fitted, {}, info
    optimizer = torch.optim.Adam(_parameter_groups(linears, moved, settings), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    due = {round((k + 1) * 0.75 * steps / settings.code_updates) for k in range(settings.code_updates)}
    changed, step = 0, 0
    for _ in range(settings.epochs):
        for chosen in torch.randperm(windows, generator=generator).split(settings.batch):
            optimizer.zero_grad()
            _accumulate(loss, chosen.tolist(), current)
            optimizer.step()
            schedule.step()
            step += 1
            if step in due:
                changed += sum(x.update_codes(settings.code_share, settings.beam) for x in linears.values())
    info["error"] = _mean_loss(loss, windows, current)
    if settings.code_updates:
        info["codes_changed"] = changed
    if not info["error"] < before:
        info["error"] = before
        return fitted, {}, info
    return (
        {name: layer.result() for name, layer in linears.items()},
        {name: vector.detach() for name, vector in moved.items()},
        info,
    )


def _parameter_groups(
    linears: dict[str, _TunedLinear], vectors: dict[str, torch.Tensor], settings: FinetuneSettings
) -> list[dict[str, object]]:
    """Adam moves each value by about its rate, so that rates follow the size of what is moved."""
    groups: list[dict[str, object]] = []
    for layer in linears.values():
        size = float(layer.books.detach().square().mean().sqrt())
        groups.append({"params": [layer.books], "lr": settings.rate * size})
        groups.append({"params": [layer.log_scales], "lr": settings.rate})
        if layer.copy is not None:
            size = float(layer.copy.detach().square().mean().sqrt())
            groups.append({"params": [layer.copy], "lr": settings.code_rate * size})
    for vector in vectors.values():
        size = float(vector.detach().square().mean().sqrt()) or 1e-2
        groups.append({"params": [vector], "lr": settings.rate * size})
    return groups


def _accumulate(loss: Loss, windows: list[int], current: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Gradients of the mean loss over some windows; the weights are built once for all of them."""
    with torch.enable_grad():
        weights = current()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        for window in windows:
            (loss(window, leaves) / len(windows)).backward()
        built = [(weights[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in built], [grad for _, grad in built])


@torch.no_grad()
def _mean_loss(
    loss: Loss, windows: int, current: Callable[[], dict[str, torch.Tensor]], limit: int = 16
) -> float:
    """Mean loss over the first windows."""
    weights = current()
    count = min(limit, windows)
    return sum(float(loss(window, weights)) for window in range(count)) / count


def window_error(task: BlockTask, window: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the window's tokens of the squared error over the squared size of the block's output."""
    pairs = zip(task.forward(window, weights), task.target(window), strict=True)
    errors = sum((found - wanted).square().sum(-1).flatten() for found, wanted in pairs)
    return (errors * task.token_weights(window)).mean()
