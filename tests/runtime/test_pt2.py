"""`.pt2` emissions: loaded with torch and the ops alone, equal to the runtime's program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompiler.emit.aoti import emit_aoti, probe
from qcompiler.emit.pt2 import emit_pt2, example_inputs
from qcompiler.kernels.errors import InvalidInputError, QCompilerError
from qcompiler.runtime.artifact import open_artifact
from qcompiler.runtime.loader import load_program

# What a process that loads the program may not import; the import of any of them fails there.
ALONE = """
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers" or name.startswith(
            ("qcompiler.runtime", "qcompiler.passes", "qcompiler.emit", "qcompiler.capture")
        ):
            raise ImportError(name + " is closed")
sys.meta_path.insert(0, Closed())
import torch
import qcompiler.kernels.ops
"""

STEPS = """
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1]).module()
given = load_file(sys.argv[2])
pages = {k: v for k, v in given.items() if "_pages_" in k}
results = {}
for step in ("prefill", "decode"):
    names = ("input_ids", "position_ids", "logits_rows", "slots", "block_table", "query_start", "seq_lens")
    inputs = [given[f"{step}.{name}"] for name in names]
    longest = int(given[f"{step}.query_start"].diff().max())
    results[step] = program(*inputs, longest, *[pages[k] for k in sorted(pages, key=by_layer)])
save_file(results, sys.argv[3])
""".replace("by_layer", "lambda k: (int(k.split('_')[2]), k)")


def steps(artifact) -> dict[str, dict[str, torch.Tensor]]:
    """A prefill of two sequences of 3 and 5 tokens, then a decode of both; pages of 16."""
    torch.manual_seed(0)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    prefill = {
        "input_ids": torch.randint(5, 2000, (1, 8)),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]),
        "logits_rows": torch.tensor([2, 7]),
        "slots": torch.tensor([16, 17, 18, 0, 1, 2, 3, 4]),
        "block_table": table,
        "query_start": torch.tensor([0, 3, 8], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 5], dtype=torch.int32),
    }
    decode = {
        "input_ids": torch.tensor([[9, 11]]),
        "position_ids": torch.tensor([[3, 5]]),
        "logits_rows": torch.tensor([0, 1]),
        "slots": torch.tensor([19, 5]),
        "block_table": table.clone(),
        "query_start": torch.tensor([0, 1, 2], dtype=torch.int32),
        "seq_lens": torch.tensor([4, 6], dtype=torch.int32),
    }
    return {"prefill": prefill, "decode": decode}


def pages_of(artifact, count: int = 2) -> dict[str, torch.Tensor]:
    return {
        i.name: torch.zeros(count, 16, *i.shape[2:]) for i in artifact.graph.inputs if "_pages_" in i.name
    }


def one_layer(folder) -> Path:
    """An encoder of one layer, compiled."""
    from transformers import BertConfig, BertModel

    from qcompiler.options import CompileOptions
    from qcompiler.pipeline import compile_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=96, **sizes)).save_pretrained(folder / "bert")
    compile_model(CompileOptions(str(folder / "bert"), output=folder / "out", eval_tokens=0))
    return folder / "out"


def test_the_program_runs_with_torch_and_the_ops_alone(tiny_q4, tmp_path):
    from safetensors.torch import load_file, save_file

    artifact = open_artifact(tiny_q4)
    path = emit_pt2(tiny_q4, tmp_path / "tiny.pt2")
    pages, given = pages_of(artifact), steps(artifact)
    flat = {f"{step}.{name}": t for step, named in given.items() for name, t in named.items()}
    save_file({**flat, **pages}, tmp_path / "in.safetensors")
    argv = [str(path), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", ALONE + STEPS, *argv], check=True, timeout=300)
    got = load_file(tmp_path / "out.safetensors")
    program = load_program(artifact, torch.device("cpu"))
    for step, inputs in given.items():
        longest = int(inputs["query_start"].diff().max())
        (wanted,) = program({**inputs, **pages, "max_query_len": longest})
        assert ((got[step] - wanted).abs().max() / wanted.abs().max()).item() < 1e-5, step


def test_the_sizes_of_the_inputs_vary(tiny_q4, tmp_path):
    program = torch.export.load(emit_pt2(tiny_q4, tmp_path / "tiny.pt2"))
    sizes = {name: v for node in program.graph.nodes if node.op == "placeholder"
             for name, v in [(node.name, node.meta["val"])] if hasattr(v, "shape")}  # fmt: skip
    assert not isinstance(sizes["input_ids"].shape[1], int)
    assert not isinstance(sizes["k_pages_0"].shape[0], int)
    assert any("linear_affine" in str(node.target) for node in program.graph.nodes)


def test_an_encoder_too(tmp_path):
    out = one_layer(tmp_path)
    artifact = open_artifact(out)
    program = torch.export.load(emit_pt2(out, tmp_path / "bert.pt2")).module()
    given = example_inputs(artifact.graph.inputs, torch.device("cpu"))
    wanted = load_program(artifact, torch.device("cpu"))(given)
    for got, one in zip(torch.utils._pytree.tree_leaves(program(*given.values())), wanted, strict=True):
        torch.testing.assert_close(got, one, atol=1e-5, rtol=1e-4)


def test_a_graph_of_ones_own_after_passes(tmp_path):
    from qcompiler.methods.base import get_method
    from qcompiler.passes import PassManager, QuantizeLinears, SelectKernels, canonical_passes

    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU()).eval(), torch.randn(5, 64)
    tokens = {0: torch.export.Dim("tokens", min=1, max=512)}
    graph = torch.export.export(model, (x,), dynamic_shapes=(tokens,)).module(check_guards=False)
    method = get_method("rtn")
    quantize = QuantizeLinears(
        lambda *_: method.resolve_spec(8), lambda name, weight, spec: method.quantize(weight, spec)
    )
    PassManager([*canonical_passes(), quantize]).run(graph)
    path = emit_pt2(graph, tmp_path / "mine.pt2", inputs=(x,), shapes=(tokens,))
    loaded = torch.export.load(path).module()
    for rows in (1, 5, 9):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(loaded(x), graph(x))
    SelectKernels("cpu").run(graph)
    with pytest.raises(InvalidInputError, match=r"linear_affine_cpu_dense.*repacked weights"):
        emit_pt2(graph, tmp_path / "other.pt2", inputs=(x,))
    with pytest.raises(InvalidInputError, match="example inputs"):
        emit_pt2(graph, tmp_path / "other.pt2")


def test_another_name_or_folder_is_refused(tiny_q4, tmp_path):
    with pytest.raises(InvalidInputError, match=r"ends in \.pt2"):
        emit_pt2(tiny_q4, tmp_path / "tiny.bin")
    with pytest.raises(InvalidInputError, match="is not a folder"):
        emit_pt2(tiny_q4, tmp_path / "none" / "tiny.pt2")


def test_a_crash_of_aotinductor_stays_in_its_process(tiny_q4, tmp_path, monkeypatch):
    """A process that dies of a signal leaves a typed error and nothing else."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nkill -SEGV $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(InvalidInputError, match="torch crashed \\(SIGSEGV\\)"):
        emit_aoti(tiny_q4, tmp_path / "a.pt2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["python"]


def test_a_package_that_computes_something_else_is_not_kept(tiny_q4, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda _: lambda *_: torch.zeros(1, 3, 2048))
    with pytest.raises(QCompilerError, match=r"differs from the program by 1\.00e\+00"):
        probe(tiny_q4, tmp_path / "any.pt2", "cpu")


@pytest.mark.slow
def test_an_aotinductor_package_on_the_cpu(tmp_path):
    """The emitter keeps only what another process has loaded, run and found equal."""
    path = emit_aoti(one_layer(tmp_path), tmp_path / "model.pt2")
    assert path.stat().st_size > 10_000
    assert not list(tmp_path.glob(".model-*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_program_on_a_gpu(tiny_q4, tmp_path):
    artifact = open_artifact(tiny_q4)
    path = emit_pt2(tiny_q4, tmp_path / "tiny.pt2", device="cuda")
    program = torch.export.load(path).module()
    given = example_inputs(artifact.graph.inputs, torch.device("cpu"))
    (wanted,) = load_program(artifact, torch.device("cpu"))(given)
    moved = [
        value.cuda() if isinstance(value, torch.Tensor) else value
        for value in example_inputs(artifact.graph.inputs, torch.device("cpu")).values()
    ]
    torch.testing.assert_close(program(*moved).cpu(), wanted, atol=5e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_aotinductor_package_on_a_gpu_is_whole_or_refused(tiny_q4, tmp_path):
    """torch may crash over it (seen with 2.11); this process must not, and nothing half-made may stay."""
    refused = ""
    try:
        emit_aoti(tiny_q4, tmp_path / "tiny.pt2", device="cuda")
    except InvalidInputError as error:
        refused = error.message
    assert [p.name for p in tmp_path.iterdir()] == ([] if refused else ["tiny.pt2"])
    assert not refused or "a package for cuda failed: " in refused
