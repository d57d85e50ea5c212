"""Artifacts whose body_tail tensors do not match their settings are refused before a kernel reads them."""

from __future__ import annotations

import json
import struct

import pytest

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.model import load

OP = "qcompiler.linear_body_tail.default"
# Positions of the op's arguments.
BITS, GROUP_SIZE, FRACTION, TAIL_BITS, IN_FEATURES = 8, 9, 10, 11, 12


@pytest.fixture(scope="module")
def tailed(tiny_folder, tmp_path_factory):
    """tiny-llama with the o_proj of each layer as body and tail."""
    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import compile_model

    out = tmp_path_factory.mktemp("tail") / "tailed"
    others = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    options = CompileOptions(
        str(tiny_folder), bits=3, method_options={"tail_fraction": "0.01"}, skip=others, output=out,
        dtype="float32", device="cpu", eval_tokens=0,
    )  # fmt: skip
    compile_model(options)
    return out


def refused(path, *words):
    with pytest.raises(ArtifactError) as caught:
        load(path, device="cpu")
    for word in words:
        assert word in str(caught.value)


def test_the_whole_artifact_is_accepted(tailed):
    assert load(tailed, device="cpu").logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"tail_fraction": 0.02},
        {"tail_fraction": 0.4},
        {"tail_fraction": "0.01"},
        {"tail_bits": 4, "tail_fraction": 0.02},
        {"tail_bits": 12},
        {"bits": 2},
        {"tail_slots": 3},
    ],
)
def test_settings_in_the_manifest_that_do_not_fit(tailed, copy_of, reseal, changes):
    artifact = copy_of(tailed)
    layers = json.loads((artifact / "manifest.json").read_text())["layers"]
    layers[0]["spec"].update(changes)
    refused(reseal(artifact, layers=layers), "o_proj")


@pytest.mark.parametrize(
    ("position", "value"),
    [(FRACTION, 0.02), (FRACTION, 0), (FRACTION, {"float": "nan"}), (TAIL_BITS, 12), (BITS, 4), (BITS, 2),
     (GROUP_SIZE, 32), (IN_FEATURES, 512), (IN_FEATURES, 1 << 40)],
)  # fmt: skip
def test_settings_in_the_graph_that_do_not_fit(tailed, copy_of, reseal, position, value):
    artifact = copy_of(tailed)
    graph = json.loads((artifact / "graph.json").read_text())
    next(node for node in graph["nodes"] if node["op"] == OP)["args"][position] = value
    (artifact / "graph.json").write_text(json.dumps(graph))
    refused(reseal(artifact), "graph.json", OP)


def test_a_tail_scale_that_is_not_a_number(tailed, copy_of, reseal):
    artifact = copy_of(tailed)
    shard = next(artifact.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n.endswith("tail_scales"))
    start = 8 + length + header[name]["data_offsets"][0]
    data[start : start + 2] = struct.pack("<H", 0x7E00)  # NaN in fp16
    shard.write_bytes(bytes(data))
    refused(reseal(artifact), name)
