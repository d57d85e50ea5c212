"""A quantization method of your own, with a storage format and kernels that are here already.

    python examples/custom_method.py examples/models/tiny-llama build/tiny-llama-clipped

From a package, the entry point group `qcompiler.methods` takes the place of `register_method`, and
`qcompile --method clipped` finds it; `examples/plugin` is one, with a storage format of its own.
"""

import sys
from pathlib import Path

import torch

from qcompiler.kernels.formats.affine import AffineSpec
from qcompiler.methods.affine import AffineMethod, Groups, store
from qcompiler.methods.base import MethodOption, register_method
from qcompiler.options import CompileOptions
from qcompiler.pipeline import compile_model


@register_method
class Clipped(AffineMethod):
    """Round to nearest over a range that leaves out each group's extremes: outliers saturate."""

    name = "clipped"
    summary = "round to nearest, outliers of a group saturate"
    options = {"sigmas": MethodOption(2.5, help="half the range, in standard deviations of the group")}  # noqa: RUF012

    def statistics(self, weight, options):
        """What `importance` gets of the whole weight: here, the option."""
        return options["sigmas"]

    def importance(self, rows, statistics):
        """A value for each weight that `solve_groups` sees in its groups."""
        return torch.full_like(rows, statistics)

    def solve_groups(self, values: torch.Tensor, spec: AffineSpec, importance) -> Groups:
        """Codes, scales and zero points of groups [groups, size] in float32."""
        top = float(2**spec.bits - 1)
        spread, mean = values.std(dim=1, keepdim=True), values.mean(dim=1, keepdim=True)
        low = torch.maximum(values.amin(1, keepdim=True), mean - importance[:, :1] * spread)
        high = torch.minimum(values.amax(1, keepdim=True), mean + importance[:, :1] * spread)
        scales, zeros = store((high - low) / top, low, torch.maximum(-low, high), spec)
        return Groups(torch.round(values / scales + zeros).clamp_(0.0, top), scales, zeros)


if __name__ == "__main__":
    model, output = sys.argv[1:]
    report = compile_model(
        CompileOptions(model, method="clipped", bits=4, output=Path(output), eval_tokens=512)
    )
    print(f"{report.bits_per_weight_linears:.2f} bits per weight, KL {report.quality.kl_mean:.4f}")
