"""The checkpoint reader: every parameter as `from_pretrained` gives it, and damaged files refused by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcompiler.capture import ModelSource
from qcompiler.capture.matrix import Family
from qcompiler.checkpoint import Checkpoint, load_config, locate, read
from qcompiler.kernels.errors import InvalidInputError, UnsupportedModelError

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = [
    Family("llama"),
    Family("qwen2", {"tie_word_embeddings": True}),
    Family("gpt2", {"n_inner": 96}),
    Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family("phi3"),
    Family("bert"),
    Family("mixtral", {"num_local_experts": 4}),
    Family("granitemoe", {"num_local_experts": 4}),
    Family("gpt_oss", {"num_local_experts": 4, "head_dim": 16}),
    # twelve experts: the tenth must not sort before the second
    Family("qwen3_moe", {"num_experts": 12, **_MOE, "head_dim": 16}),
    Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            **_MOE,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
]


def saved(family: Family, folder: Path, **options: Any) -> Any:
    """A random model of the family, saved to the folder."""
    torch.manual_seed(0)
    source = ModelSource.from_config(family.config())
    model = source.model_class(source.config)
    model.save_pretrained(folder, **options)
    return source.model_class


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_equals_from_pretrained(family: Family, tmp_path: Path) -> None:
    model_class = saved(family, tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists(), "this test is about sharded checkpoints"
    expected = model_class.from_pretrained(tmp_path).state_dict()
    with ModelSource.from_pretrained(tmp_path).checkpoint as checkpoint:
        assert set(checkpoint.names()) | set(checkpoint.tied) == set(expected)
        for name, value in expected.items():
            assert checkpoint.shape(name) == tuple(value.shape)
            assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.unused == []


def test_stored_bytes_count_tied_embeddings_once(tmp_path: Path) -> None:
    saved(Family("qwen2", {"tie_word_embeddings": True}), tmp_path)
    with ModelSource.from_pretrained(tmp_path).checkpoint as checkpoint:
        assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in checkpoint.names()
        data = load_file(tmp_path / "model.safetensors")
        assert checkpoint.bytes == sum(tensor.nbytes for tensor in data.values())


def test_embeddings_stored_apart_are_not_tied(tmp_path: Path) -> None:
    """The config says tied, the checkpoint holds two different tensors: transformers believes the tensors."""
    saved(Family("qwen2", {"tie_word_embeddings": True}), tmp_path)
    data = load_file(tmp_path / "model.safetensors")
    data["lm_head.weight"] = torch.ones_like(data["model.embed_tokens.weight"])
    save_file(data, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource.from_pretrained(tmp_path)
    assert source.checkpoint is not None
    assert source.checkpoint.tied == {}
    assert torch.equal(source.checkpoint.tensor("lm_head.weight"), data["lm_head.weight"])


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    with ModelSource.from_pretrained(TINY_LLAMA).checkpoint as checkpoint:
        name = checkpoint.names()[0]
        assert checkpoint.tensor(name).dtype == load_config(TINY_LLAMA).dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(Family("llama"), tmp_path, max_shard_size="60KB")
    return tmp_path


def refused(folder: Path, *words: str, error: type[InvalidInputError] = InvalidInputError) -> None:
    with pytest.raises(error) as refusal:
        ModelSource.from_pretrained(folder)
    for word in words:
        assert word in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(folder, shard.name, "truncated")


def test_trailing_bytes(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes() + b"x")
    refused(folder, shard.name, "trailing")


def test_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_index_naming_an_absent_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.nothing"] = sorted(content["weight_map"].values())[0]
    index.write_text(json.dumps(content))
    refused(folder, "model.layers.9.nothing")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", ""])
def test_index_leading_out_of_the_folder(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    refused(folder, repr(name))


def test_missing_parameter(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    data = load_file(tmp_path / "model.safetensors")
    del data["model.norm.weight"]
    save_file(data, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight")


def test_shape_that_the_config_does_not_have(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    data = load_file(tmp_path / "model.safetensors")
    data["model.norm.weight"] = torch.ones(65)
    save_file(data, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight", "(65,)", "(64,)")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', "twice"),
        (b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}', "needs"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "gap"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_hostile_header(tmp_path: Path, header: bytes, word: str) -> None:
    saved(Family("llama"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path, "model.safetensors", word)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(tmp_path, "header")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path, "pytorch_model.bin", "pickle", "safetensors")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "config.json")


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "auto_map", "--trust-remote-code", error=UnsupportedModelError)


def test_auto_map_of_a_type_that_transformers_knows_is_ignored(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    assert ModelSource.from_pretrained(tmp_path).model_class.__name__ == "LlamaForCausalLM"


def test_checkpoint_that_is_quantized_already(tmp_path: Path) -> None:
    saved(Family("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "gptq", error=UnsupportedModelError)


def test_local_folder_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="no folder"):
        locate("./no-such-folder")
    with pytest.raises(InvalidInputError, match="no folder"):
        locate("a/b/c")


def test_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidInputError, match="HF_HUB_OFFLINE") as refusal:
        locate("nobody/no-such-model")
    assert "hf download nobody/no-such-model" in str(refusal.value)


def test_gated_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: object, **__: object) -> str:
        # made without its constructor, whose response argument differs between releases of the hub client
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(InvalidInputError, match="grant you access") as refusal:
        locate("owner/gated-model")
    assert "hf auth login" in str(refusal.value)


def test_one_parameter_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter is memory of its own, read in pieces; no shard stays open."""
    monkeypatch.setattr("qcompiler.checkpoint.read._PIECE_BYTES", 100)
    checkpoint = ModelSource.from_pretrained(folder).checkpoint
    assert isinstance(checkpoint, Checkpoint)
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    weight = checkpoint.tensor(name)
    assert torch.equal(weight, stored[name])
    weight.zero_()
    assert torch.equal(checkpoint.tensor(name), stored[name])
    opened = {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}
    assert not opened & {str(file) for file in folder.glob("*.safetensors")}


def test_a_file_cut_short_after_it_was_checked_is_refused(folder: Path) -> None:
    checkpoint = ModelSource.from_pretrained(folder).checkpoint
    assert checkpoint is not None
    for file in folder.glob("*.safetensors"):
        os.truncate(file, 100)
    with pytest.raises(InvalidInputError, match=r"safetensors cannot be read: it ends before"):
        checkpoint.tensor("model.norm.weight")


def test_unknown_parameter_name(folder: Path) -> None:
    checkpoint = ModelSource.from_pretrained(folder).checkpoint
    assert checkpoint is not None
    with pytest.raises(InvalidInputError, match="no parameter 'nothing'"):
        checkpoint.tensor("nothing")


def test_files_are_announced_to_the_system_up_to_a_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[str, int]] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        advised.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), start))
        if len(advised) == 1:
            raise OSError("this file system takes no advice")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    files = [folder / "gone.safetensors", *sorted(folder.glob("*.safetensors"))]
    assert len(files) > 3
    read._advise(files, files[2].stat().st_size + files[3].stat().st_size)
    assert advised == [(str(file), 0) for file in files[1:4]]  # what fails does not count
