"""What the tests of grouped linears over stored weights share: rows, experts, oracle, poisoned memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

EXPERTS, ROWS, OUTPUTS = 5, 40, 33
OFFSETS = {
    "ragged": (0, 17, 18, 18, 37),
    "all": (8, 16, 24, 32, 40),
    "one-expert": (0, 0, 40, 40, 40),
    "none": (0,) * 5,
}


def each_row_by_itself(x, dense, bias, ends):
    """What each row gives in float64 over its expert's part of `dense`, and |x|·|w| of each element."""
    dense = dense.view(EXPERTS, OUTPUTS, -1)
    wanted, size = torch.zeros(2, len(x), OUTPUTS, dtype=torch.float64)
    for row in range(ends[-1]):
        expert = next(e for e, end in enumerate(ends) if row < end)
        wanted[row] = F.linear(
            x[row].double(), dense[expert], None if bias is None else bias[expert].double()
        )
        size[row] = x[row].double().norm() * dense[expert].norm(dim=1)
    return wanted, size


def assert_close(y, wanted, size):
    """Off by the rounding of the output, and of weights and scales to x's dtype in the kernel.

    As for `linear_affine`: independent roundings, so eps·|x|·|w| bounds them.
    """
    eps = torch.finfo(y.dtype).eps
    assert y.shape == wanted.shape
    error = (y.double().cpu() - wanted).abs()
    assert bool((error <= eps * (wanted.abs() + size) + 1e-6 * size).all()), float(error.max())


def on_device(target, arguments):
    device, _ = target
    return [_guarded(a, device) if isinstance(a, torch.Tensor) else a for a in arguments]


def _guarded(tensor, device):
    """The same values, contiguous, inside a larger buffer of NaN or of all-one bits."""
    fill = float("nan") if tensor.is_floating_point() else (255 if tensor.dtype == torch.uint8 else -1)
    buffer = torch.full((tensor.numel() + 4096,), fill, dtype=tensor.dtype, device=device)
    inner = buffer[2048 : 2048 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def give_outputs(monkeypatch, change):
    """Let the launcher's output be `change(output)`; gives the list of the shapes that it asked for."""
    asked = []
    new_empty = torch.Tensor.new_empty

    def changed(self, *shape, **options):
        made = new_empty(self, *shape, **options)
        if made.shape != (ROWS, OUTPUTS):
            return made
        asked.append(tuple(made.shape))
        return change(made)

    monkeypatch.setattr(torch.Tensor, "new_empty", changed)
    return asked
