"""An artifact with every affine weight solved again for integer zero points.

For artifacts compiled with zero points of any value: what they stand for is quantized once more at the
same bits and groups. `resolved_quality` tells what that costs against the artifact.
"""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.emit.onnx.packing import are_codes
from qcompiler.kernels.formats.affine import AFFINE, AffineSpec
from qcompiler.methods.hqq import HQQ
from qcompiler.quality import Quality, QualityMeter, windows
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.manifest import LayerEntry
from qcompiler.runtime.model import Model, load_opened

_CONTEXT = 512


def float_zero_layers(artifact: Artifact) -> list[LayerEntry]:
    """The affine layers whose zero points are not all codes."""
    found = []
    for layer in artifact.manifest.layers:
        if layer.format == AFFINE.name:
            bits = AffineSpec.from_json(layer.spec).bits
            if not are_codes(artifact.read(layer.tensors["zeros"]), bits):
                found.append(layer)
    return found


class IntegerZeros(Artifact):
    """The artifact, but reading a tensor of one of `layers` gives that of the solved weight."""

    def __init__(self, artifact: Artifact, layers: list[LayerEntry]):
        super().__init__(artifact.root, artifact.manifest, artifact.graph, artifact.tensors)
        self._layer_of = {name: layer for layer in layers for name in layer.tensors.values()}
        self._kept: dict[str, torch.Tensor] = {}
        self._kept_layer = ""

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """See `Artifact.read`."""
        layer = self._layer_of.get(name)
        if layer is None:
            return super().read(name, device)
        if layer.name != self._kept_layer:
            self._kept = self._solve(layer)
            self._kept_layer = layer.name
        return self._kept[name].to(device)

    def _solve(self, layer: LayerEntry) -> dict[str, torch.Tensor]:
        spec = AffineSpec.from_json(layer.spec)
        stored = {part: super(IntegerZeros, self).read(name) for part, name in layer.tensors.items()}
        weight = AFFINE.dequantize(spec, stored, layer.in_features, torch.float32)
        solved = HQQ().quantize(weight, spec, {"zeros": "integer"}, name=layer.name)
        return {layer.tensors[part]: tensor for part, tensor in solved.items()}


def resolved_quality(artifact: Artifact, resolved: Artifact, text: str, tokens: int) -> Quality | None:
    """How the solved weights compare with the artifact's own on a text, both in the runtime's engine.

    Args:
        artifact: The artifact.
        resolved: The same with integer zero points.
        text: Text to score.
        tokens: Tokens of it.

    Returns:
        The figures, or None for encoders and artifacts without a tokenizer.
    """
    if artifact.manifest.kind != "decoder" or "tokenizer.json" not in artifact.manifest.files or not tokens:
        return None
    options: dict[str, Any] = {"device": "cpu", "max_sequences": 1}
    before, after = (_load(opened, options) for opened in (artifact, resolved))
    ids = before.tokenizer.encode(text[: 16 * tokens], add_special_tokens=False)[:tokens]
    meter = QualityMeter()
    for window in windows(ids, min(_CONTEXT, before.max_context)):
        targets = torch.tensor(window[1:])
        meter.update(before.logits(window)[:-1], after.logits(window)[:-1], targets)
    return meter.result()


def _load(artifact: Artifact, options: dict[str, Any]) -> Model:
    return load_opened(artifact, **options)
