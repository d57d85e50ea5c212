"""Faults that every release must survive: each is refused with a typed error naming file and reason."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import sys

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.artifact import check_contents, gpu_obstacle, open_artifact
from qcompiler.runtime.manifest import GpuRequirement
from qcompiler.runtime.model import load

SHARD = "weights-00001-of-00001.safetensors"


def refused(path, *words, **options):
    with pytest.raises(ArtifactError) as caught:
        load(path, device="cpu", **options)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def header_of(shard):
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(shard, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change_header(artifact, change):
    header, body = header_of(artifact / SHARD)
    change(header)
    write_shard(artifact / SHARD, header, body)


def change_graph(artifact, change):
    graph = json.loads((artifact / "graph.json").read_text())
    change(graph)
    (artifact / "graph.json").write_text(json.dumps(graph))


def node_of(graph, op):
    return next(n for n in graph["nodes"] if n["op"] == op)


def test_a_whole_artifact_is_accepted(artifact):
    opened = open_artifact(artifact)
    assert sorted(check_contents(opened)) == sorted(opened.graph.weights)


@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_fault_01_truncated_shard(artifact, verify):
    data = (artifact / SHARD).read_bytes()
    (artifact / SHARD).write_bytes(data[: len(data) // 2])
    refused(artifact, SHARD, "bytes", verify=verify)


def test_fault_01_truncated_shard_with_fitting_manifest(artifact, reseal):
    data = (artifact / SHARD).read_bytes()
    (artifact / SHARD).write_bytes(data[:-1000])
    refused(reseal(artifact), SHARD, "truncated")


@pytest.mark.parametrize("name", [SHARD, "graph.json", "tokenizer.json", "README.md"])
def test_fault_02_flipped_bit(artifact, name):
    data = bytearray((artifact / name).read_bytes())
    data[len(data) * 3 // 4] ^= 1
    (artifact / name).write_bytes(bytes(data))
    refused(artifact, name, "SHA-256")


def test_fault_02_flipped_bit_in_the_manifest(artifact):
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace('"max_context": 2048', '"max_context": 2049'))
    refused(artifact, "manifest.json", "checksum")


def test_fault_03_trailing_bytes(artifact, reseal):
    with (artifact / SHARD).open("ab") as f:
        f.write(b"\0" * 16)
    refused(artifact, SHARD)
    refused(reseal(artifact), SHARD, "appended")


@pytest.mark.parametrize("name", [SHARD, "graph.json", "tokenizer.json"])
def test_fault_04_missing_file(artifact, name):
    (artifact / name).unlink()
    refused(artifact, name, "missing")


def test_fault_04_missing_manifest(artifact):
    (artifact / "manifest.json").unlink()
    refused(artifact, "manifest.json")


def test_fault_04_extra_file(artifact):
    (artifact / "notes.md").write_text("hello")
    refused(artifact, "notes.md", "not in the manifest")


def test_fault_04_extra_folder(artifact):
    (artifact / "more").mkdir()
    refused(artifact, "more", "plain file")


def test_fault_04_extra_and_missing_tensor(artifact, reseal):
    change_graph(artifact, lambda g: g["weights"].append("model.no_such_weight"))
    refused(reseal(artifact), "model.no_such_weight")


def test_fault_05_duplicate_tensor_name(artifact, reseal):
    header, body = header_of(artifact / SHARD)
    name = next(n for n in header if n != "__metadata__")
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    write_shard(artifact / SHARD, text.encode(), body)
    refused(reseal(artifact), SHARD, "duplicate", name)


def test_fault_05_tensor_in_two_files(artifact, reseal):
    (artifact / "weights-00002-of-00002.safetensors").write_bytes((artifact / SHARD).read_bytes())
    refused(reseal(artifact), "is also in", SHARD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_fault_06_nan_scale(artifact, reseal, value, part):
    header, body = header_of(artifact / SHARD)
    name = next(n for n in header if n.endswith(f"o_proj.{part}"))
    begin, _ = header[name]["data_offsets"]
    raw = torch.tensor([value], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    write_shard(artifact / SHARD, header, body[: begin + 6] + raw + body[begin + 8 :])
    refused(reseal(artifact), SHARD, name, "NaN or Inf")


def test_fault_06_nan_weight_is_found_by_verify(artifact, reseal):
    header, body = header_of(artifact / SHARD)
    name = "model.embed_tokens.weight"
    begin, _ = header[name]["data_offsets"]
    write_shard(artifact / SHARD, header, body[:begin] + struct.pack("<f", float("nan")) + body[begin + 4 :])
    opened = open_artifact(reseal(artifact))
    with pytest.raises(ArtifactError, match=name):
        list(check_contents(opened))


def overlap(header):
    first, second = [n for n in header if n.endswith("q_proj_and_k_proj_and_v_proj.low")][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def huge_offset(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["data_offsets"] = [0, 1 << 60]


def huge_shape(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["shape"] = [1 << 40, 1 << 40]


def negative_shape(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["shape"] = [-1, -1]


def backward_offsets(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["data_offsets"].reverse()


def deep_shape(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["shape"] += [1] * 100


def float_shape(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["shape"] = [float(s) for s in header[name]["shape"]]


def unknown_dtype(header):
    name = next(n for n in header if n.endswith(".low"))
    header[name]["dtype"] = "C64"


@pytest.mark.parametrize(
    "change",
    [
        overlap,
        huge_offset,
        huge_shape,
        negative_shape,
        backward_offsets,
        deep_shape,
        float_shape,
        unknown_dtype,
    ],
)
def test_fault_07_offsets_and_shapes(artifact, reseal, change):
    change_header(artifact, change)
    refused(reseal(artifact), SHARD)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 0xFFFFFFFFFFFFFFFF])
def test_fault_07_huge_header(artifact, reseal, length):
    data = (artifact / SHARD).read_bytes()
    (artifact / SHARD).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(reseal(artifact), SHARD, "header length")


@pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
@pytest.mark.parametrize("depth", [100, 100_000])
def test_fault_08_deeply_nested_json(artifact, reseal, name, depth):
    (artifact / name).write_text("[" * depth + "]" * depth)
    if name != "manifest.json":
        reseal(artifact)
    refused(artifact, name)


def test_fault_08_giant_json(artifact, reseal):
    with (artifact / "graph.json").open("wb") as f:
        f.truncate(65 << 20)  # a sparse file: nothing is read beyond its size
    refused(reseal(artifact), "graph.json", "bytes of JSON")


def test_fault_08_giant_number(artifact, reseal):
    text = (artifact / "graph.json").read_text()
    (artifact / "graph.json").write_text(text.replace('"schema":1', '"schema":' + "9" * 5000, 1))
    refused(reseal(artifact), "graph.json")


@pytest.mark.parametrize(
    "name",
    ["../outside.json", "/etc/passwd.json", "..", "a/b.json", ".hidden.json", "a\\b.json", "", "x\0.json"],
)
def test_fault_09_paths_in_the_manifest(artifact, reseal, name):
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    files[name] = {"size": 1, "sha256": "0" * 64}
    refused(reseal(artifact, files=files), "manifest.json", "refused")


def test_fault_09_symbolic_link(artifact, tmp_path):
    target = tmp_path / "elsewhere.json"
    (artifact / "tokenizer.json").rename(target)
    (artifact / "tokenizer.json").symlink_to(target)
    refused(artifact, "tokenizer.json", "symbolic link")


def test_fault_09_hard_link(artifact, tmp_path):
    os.link(artifact / "tokenizer.json", tmp_path / "elsewhere.json")
    refused(artifact, "tokenizer.json", "hard-linked")


def test_fault_09_not_a_file(artifact):
    (artifact / "tokenizer.json").unlink()
    os.mkfifo(artifact / "tokenizer.json")
    refused(artifact, "tokenizer.json", "not a plain file")


@pytest.mark.parametrize("name", ["weights.safetensors.gz", "tokenizer.json.zst", "model.zip", "x.tar"])
def test_fault_10_archives_are_not_opened(artifact, reseal, name):
    (artifact / name).write_bytes(gzip.compress(b"\0" * (1 << 20)))
    refused(reseal(artifact), name)


def test_fault_10_compressed_json(artifact, reseal):
    (artifact / "graph.json").write_bytes(gzip.compress(b" " * (1 << 20)))
    refused(reseal(artifact), "graph.json", "not valid JSON")


class Trap:
    fired = False

    def __reduce__(self):
        return (setattr, (Trap, "fired", True))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pkl", "model.pt", "model.pth", "data.npy", "a.py"]
)
def test_fault_11_pickles_and_code(artifact, reseal, name):
    (artifact / name).write_bytes(pickle.dumps(Trap()))
    refused(artifact, name)
    refused(reseal(artifact), name, "no kind of file")
    assert not Trap.fired


@pytest.mark.parametrize("name", [SHARD, "graph.json", "manifest.json", "tokenizer.json"])
def test_fault_11_pickle_under_another_name(artifact, reseal, name):
    (artifact / name).write_bytes(pickle.dumps(Trap()))
    if name != "manifest.json":
        reseal(artifact)
    with pytest.raises(ArtifactError, match=name.split(".")[0]):
        load(artifact, device="cpu").tokenizer.encode("a")
    assert not Trap.fired


@pytest.mark.parametrize(
    "size",
    ["__import__('os').system('true')", "T+1", "2**10**10", "T" * 1000, "a.b", "1", "", -1, 1 << 60, 1.5],
)
def test_fault_12_hostile_shape(artifact, reseal, size):
    def change(graph):
        graph["inputs"][0]["shape"][1] = size

    change_graph(artifact, change)
    refused(reseal(artifact), "graph.json", "neither a number nor a plain name")


@pytest.mark.parametrize(
    "argument",
    [
        {"ref": "__import__('os')"},
        {"expr": "T*2"},
        {"ref": "linear_28"},  # a later node
        {"weight": "no.such"},
        {"device": "cuda:7"},
        {"dtype": "object"},
        {"float": "1e999"},
        "T",
        True,
        None,
        [[[[[[1]]]]]],
    ],
)
def test_fault_12_hostile_argument(artifact, reseal, argument):
    def change(graph):
        node_of(graph, "aten.transpose.int")["args"][1] = argument

    change_graph(artifact, change)
    refused(reseal(artifact), "graph.json", "aten.transpose.int")


@pytest.mark.parametrize("dtype", [[1], {"dtype": "float32"}, "object", 3])
def test_fault_12_hostile_dtype(artifact, reseal, dtype):
    change_graph(artifact, lambda g: g["nodes"][3].update(dtype=dtype))
    refused(reseal(artifact), "graph.json", "dtype")


def test_fault_12_numbers_that_grow_without_end(artifact, reseal):
    def change(graph):
        grown = {"ref": graph["nodes"][0]["name"]}
        new = [{"name": "g0", "op": "sym.add", "args": [grown, 1 << 40]}]
        new += [{"name": f"g{i}", "op": "sym.mul", "args": [{"ref": f"g{i - 1}"}] * 2} for i in range(1, 40)]
        graph["nodes"][1:1] = new

    change_graph(artifact, change)
    model = load(reseal(artifact), device="cpu")
    with pytest.raises(ArtifactError, match="62-bit"):
        model.logits([1, 2, 3])


@pytest.mark.parametrize(
    "op",
    [
        "os.system",
        "builtins.eval",
        "aten.from_file.default",
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "qcompiler.no_such_op.default",
        "qcompiler.linear_affine_cpu_int4.default",
        "prims.convert_element_type.default",
        "aten.add",
        "sym.__import__",
        "",
    ],
)
def test_fault_13_op_outside_the_list(artifact, reseal, op):
    def change(graph):
        graph["nodes"][3]["op"] = op

    change_graph(artifact, change)
    refused(reseal(artifact), "graph.json", graph_name(artifact, 3), "not on the list")


def graph_name(artifact, index):
    return json.loads((artifact / "graph.json").read_text())["nodes"][index]["name"]


def test_fault_13_writing_into_a_weight(artifact, reseal):
    def change(graph):
        weight = {"weight": "model.embed_tokens.weight"}
        graph["nodes"].insert(0, {"name": "w", "op": "aten.transpose.int", "args": [weight, 0, 1]})
        graph["nodes"].insert(1, {"name": "x", "op": "aten.fill_.Scalar", "args": [{"ref": "w"}, 1.0]})

    change_graph(artifact, change)
    refused(reseal(artifact), "writes in place", "model.embed_tokens.weight")


def test_fault_13_huge_tensor_out_of_nothing(artifact, reseal):
    def change(graph):
        graph["nodes"].insert(0, {"name": "z", "op": "aten.zeros.default", "args": [[1 << 20, 1 << 20]]})

    change_graph(artifact, change)
    refused(reseal(artifact), "aten.zeros.default", "elements")


def test_fault_14_newer_schema(artifact, reseal):
    refused(reseal(artifact, schema=2), "manifest.json", "newer", "pip install -U qcompiler")


def test_fault_14_newer_graph_schema(artifact, reseal):
    change_graph(artifact, lambda g: g.update(schema=7))
    refused(reseal(artifact), "graph.json", "newer", "pip install -U qcompiler")


def test_fault_14_newer_op_library(artifact, reseal):
    refused(reseal(artifact, ops={"qcompiler": 99}), "op library", "pip install -U qcompiler")


def change_layer(artifact, **changes):
    layers = json.loads((artifact / "manifest.json").read_text())["layers"]
    layer = next(entry for entry in layers if entry["name"].endswith("o_proj"))
    for key, value in changes.items():
        (layer["spec"] if key in ("bits", "group_size") else layer)[key] = value
    return layers


@pytest.mark.parametrize(
    "changes",
    [{"bits": 8}, {"bits": 3}, {"group_size": 32}, {"in_features": 512}, {"out_features": 255}, {"bits": 7}],
)
def test_fault_15_packed_shape_in_the_manifest(artifact, reseal, changes):
    refused(reseal(artifact, layers=change_layer(artifact, **changes)), "o_proj")


def test_fault_15_settings_of_another_type(artifact, reseal):
    layers = change_layer(artifact, bits=[4])
    refused(reseal(artifact, layers=layers), "o_proj")
    layers = change_layer(artifact)
    layers[0]["spec"]["scale_dtype"] = ["float16"]
    refused(reseal(artifact, layers=layers), layers[0]["name"])


def test_fault_15_unknown_format(artifact, reseal):
    refused(reseal(artifact, layers=change_layer(artifact, format="mystery")), "mystery", "Known formats")


@pytest.mark.parametrize(
    ("position", "value"), [(6, 8), (6, 2), (7, 16), (7, 0), (8, 1024), (8, 1 << 40), (6, 3)]
)
def test_fault_15_packed_shape_in_the_graph(artifact, reseal, position, value):
    def change(graph):
        node_of(graph, "qcompiler.linear_affine.default")["args"][position] = value

    change_graph(artifact, change)
    refused(reseal(artifact), "graph.json", "qcompiler.linear_affine.default")


def test_fault_16_gpu_too_old_falls_back_or_says_what_is_needed():
    needs = GpuRequirement((9, 0))
    assert gpu_obstacle(needs, (9, 0)) is None
    assert gpu_obstacle(needs, (10, 3)) is None
    assert gpu_obstacle(GpuRequirement(), (5, 0)) is None
    reason = gpu_obstacle(needs, (8, 6))
    assert "9.0" in reason
    assert "8.6" in reason


def test_fault_16_with_fallback_the_cpu_serves(artifact, reseal, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    reseal(artifact, requires={"compute_capability": [9, 0], "fallback": True})
    assert load(artifact).device.type == "cpu"
    assert "9.0" in caplog.text
    with pytest.raises(ArtifactError, match=r"compute capability 9\.0"):
        load(artifact, device="cuda")


def test_fault_16_without_fallback_it_is_an_error(artifact, reseal):
    reseal(artifact, requires={"compute_capability": [9, 0], "fallback": False})
    refused(artifact, "GPU")


def test_fault_17_auto_map_is_ignored(artifact, reseal):
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((artifact / name).read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
        config["trust_remote_code"] = True
        (artifact / name).write_text(json.dumps(config))
    model = load(reseal(artifact), device="cpu")
    assert model.generate("a", max_tokens=2)
    assert "evil" not in sys.modules
    assert "transformers_modules" not in sys.modules
