"""Artifacts for the tests of the runtime: tiny-llama through capture, passes and emitter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
MODELS = Path(__file__).parents[2] / "examples" / "models"
TINY = MODELS / "tiny-llama"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


def rtn_part(recipe: Any, load: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored tensors of one weight, rounded to nearest."""
    from qcompiler.kernels.formats import get_format
    from qcompiler.passes import resolve

    weight = resolve(recipe.source, load).float()
    size = recipe.spec.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**recipe.spec.bits - 1)).clamp_min(1e-8)
    zeros = -low / scales
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**recipe.spec.bits - 1)
    return get_format("affine").pack(recipe.spec, codes.flatten(1).to(torch.uint8), scales, zeros)


def compile_folder(
    folder: Path, out: Path, *, bits: int | None, dtype: torch.dtype, fuse: bool = True
) -> Path:
    """A checkpoint folder as an artifact; `bits` None leaves every weight as it is."""
    from qcompiler.capture import ModelSource, capture
    from qcompiler.checkpoint.reader import Checkpoint
    from qcompiler.emit.artifact import ArtifactInfo, write_artifact
    from qcompiler.emit.graph_json import graph_weights
    from qcompiler.kernels.formats import AffineSpec
    from qcompiler.passes import PassManager, QuantizeLinears, canonical_passes, lowering_passes, resolve
    from qcompiler.passes.weights import recipe_of

    source = ModelSource.from_pretrained(folder)
    captured = capture(source, dtype)
    passes = canonical_passes()
    if bits is not None:
        spec = AffineSpec(bits, 64)
        passes.append(QuantizeLinears(lambda name, n, k: "head" if name == "lm_head" else spec))
    PassManager([*passes, *lowering_passes(captured.kind, fuse=fuse)]).run(captured.graph)
    held = [*captured.graph.named_parameters(), *captured.graph.named_buffers()]
    constants = {name: t.detach() for name, t in held if not t.is_meta}  # e.g. rotary frequencies
    with Checkpoint.open(folder, source.skeleton(dtype)) as checkpoint:

        def load(name: str) -> torch.Tensor:
            held = constants.get(name)
            return checkpoint.tensor(name).to(dtype) if held is None else held

        def weights():
            for name in graph_weights(captured.graph):
                recipe = recipe_of(captured.graph, name)
                yield name, resolve(recipe, load, lambda r: rtn_part(r, load))

        eos = captured.config.get("eos_token_id")
        write_artifact(
            out,
            captured.graph,
            weights(),
            info=ArtifactInfo(
                kind=captured.kind,
                dtype=str(dtype).removeprefix("torch."),
                model_type=captured.config["model_type"],
                vocab_size=captured.vocab_size,
                max_context=captured.max_positions or 2048,
                eos_token_ids=(eos,) if isinstance(eos, int) else (),
                bos_token_id=captured.config.get("bos_token_id"),
            ),
            files={n: folder / n for n in TOKENIZER_FILES if (folder / n).is_file()},
        )
    return out


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return TINY


@pytest.fixture(scope="session")
def compile_tiny() -> Callable[..., Path]:
    """`compile_folder` of tiny-llama."""
    return partial(compile_folder, TINY)


@pytest.fixture(scope="session")
def tiny_q4(tmp_path_factory) -> Path:
    """tiny-llama, 4 bits in groups of 64, float32 activations."""
    return compile_folder(TINY, tmp_path_factory.mktemp("art") / "tiny-q4", bits=4, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_float(tmp_path_factory) -> Path:
    """tiny-llama as it is, in float32."""
    return compile_folder(TINY, tmp_path_factory.mktemp("art") / "tiny-float", bits=None, dtype=torch.float32)


@pytest.fixture
def copy_of(tmp_path) -> Callable[[Path], Path]:
    """A private copy of an artifact, to be damaged."""

    def copy(artifact: Path) -> Path:
        return Path(shutil.copytree(artifact, tmp_path / artifact.name))

    return copy


def reseal(artifact: Path, **changes: Any) -> Path:
    """Make digests fit again after tampering, as an attacker would; `changes` go into the manifest."""
    import hashlib
    import json

    from qcompiler.runtime.manifest import checksum

    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest.update(changes)
    if "files" not in changes:
        manifest["files"] = {
            f.name: {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
            for f in sorted(artifact.iterdir())
            if f.name != "manifest.json"
        }
    manifest["checksum"] = checksum(manifest)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    return artifact


@pytest.fixture(name="reseal")
def reseal_fixture() -> Callable[..., Path]:
    return reseal


@pytest.fixture
def artifact(tiny_q4, copy_of) -> Path:
    """A private copy of the 4-bit tiny-llama."""
    return copy_of(tiny_q4)


@pytest.fixture(scope="session")
def q4_model(tiny_q4):
    from qcompiler.runtime.model import load

    return load(tiny_q4, device="cpu")


@pytest.fixture(scope="session")
def float_model(tiny_float):
    from qcompiler.runtime.model import load

    return load(tiny_float, device="cpu")
