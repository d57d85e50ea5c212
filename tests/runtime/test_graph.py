"""graph.json: what is accepted, what is refused with node and op named, and how it runs."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from qcompiler.kernels.errors import ArtifactError
from qcompiler.runtime.graph import decode
from qcompiler.runtime.program import GraphRunError, Program

CPU = torch.device("cpu")


def graph(nodes, *, weights=(), outputs=None, inputs=("x",)):
    return {
        "schema": 1,
        "kind": "decoder",
        "inputs": [{"name": n, "dtype": "float32", "shape": [1, "T"]} for n in inputs],
        "weights": list(weights),
        "nodes": nodes,
        "outputs": outputs or [{"ref": nodes[-1]["name"]}],
    }


def node(name, op, *args, **kwargs):
    return {"name": name, "op": op, "args": list(args), **({"kwargs": kwargs} if kwargs else {})}


X = {"ref": "x"}


def run(raw, inputs, weights=None):
    raw = json.loads(json.dumps(raw))
    return Program(decode(raw), weights or {}, CPU)(inputs)


def test_ops_sizes_lists_and_keywords():
    raw = graph(
        [
            node("n", "sym.size", X, 1),
            node("half", "sym.floordiv", {"ref": "n"}, 2),
            node("parts", "aten.split_with_sizes.default", X, [{"ref": "half"}, {"ref": "half"}], 1),
            node("a", "sym.getitem", {"ref": "parts"}, 0),
            node("b", "sym.getitem", {"ref": "parts"}, 1),
            node("ab", "aten.cat.default", [{"ref": "b"}, {"ref": "a"}], 1),
            node(
                "r",
                "aten.arange.default",
                {"ref": "n"},
                dtype={"dtype": "float32"},
                device={"device": "model"},
            ),
            node("y", "aten.add.Tensor", {"ref": "ab"}, {"ref": "r"}, alpha=2),
        ]
    )
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(run(raw, {"x": x})[0], torch.tensor([[3.0, 6.0, 5.0, 8.0]]))


def test_numbers_infinities_and_none():
    raw = graph(
        [
            node("y", "aten.clamp.default", X, None, {"float": "inf"}),
            node("z", "aten.mul.Tensor", {"ref": "y"}, 0.5),
        ]
    )
    assert torch.equal(run(raw, {"x": torch.tensor([[4.0]])})[0], torch.tensor([[2.0]]))


def test_weights_are_bound_by_name_and_constants_computed_once():
    raw = graph(
        [
            node("wt", "aten.transpose.int", {"weight": "w"}, 0, 1),
            node("c", "aten.cos.default", {"ref": "wt"}),
            node("y", "aten.matmul.default", X, {"ref": "c"}),
        ],
        weights=["w"],
    )
    w = torch.randn(3, 2)
    program = Program(decode(raw), {"w": w}, CPU)
    assert len(program) == 1
    x = torch.randn(1, 2)
    torch.testing.assert_close(program({"x": x})[0], x @ w.t().cos())


def test_a_constant_that_is_written_to_starts_anew_in_each_run():
    raw = graph(
        [
            node("z", "aten.zeros_like.default", {"weight": "w"}),
            node("y", "aten.add_.Tensor", {"ref": "z"}, X),
        ],
        weights=["w"],
    )
    program = Program(decode(raw), {"w": torch.ones(1, 2)}, CPU)
    for _ in range(2):
        assert torch.equal(program({"x": torch.ones(1, 2)})[0], torch.ones(1, 2))


def test_values_are_freed_after_their_last_use():
    raw = graph([node(f"n{i}", "aten.add.Tensor", {"ref": f"n{i - 1}" if i else "x"}, 1) for i in range(3)])
    program = Program(decode(raw), {}, CPU)
    alive = []
    steps = program._steps
    original = [s.fn for s in steps]

    def spy(index):
        def call(*args):
            alive.append(sum(r() is not None for r in made))
            result = original[index](*args)
            made.append(weakref.ref(result))
            return result

        return call

    made = []
    for i, step in enumerate(steps):
        step.fn = spy(i)
    program({"x": torch.ones(1, 2)})
    assert alive == [0, 1, 1]


def test_a_failing_op_is_named():
    raw = graph([node("bad", "aten.matmul.default", X, X)])
    with pytest.raises(GraphRunError, match=r"'bad' \(aten\.matmul\.default\)"):
        run(raw, {"x": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("a", "aten.cos.default", {"ref": "b"}), node("b", "aten.cos.default", X)], "no earlier node"),
        ([node("a", "aten.cos.default", X), node("a", "aten.sin.default", X)], "taken"),
        ([node("x", "aten.cos.default", X)], "taken"),
        ([node("a b", "aten.cos.default", X)], "malformed"),
        ([node("a", "aten.cos.default")], "missing"),
        ([node("a", "aten.cos.default", X, 1)], "takes 1"),
        ([node("a", "aten.cos.default", X, self=X)], "given twice"),
        ([node("a", "aten.cos.default", X, depth=1)], "unknown"),
        ([node("a", "aten.transpose.int", X, "0", 1)], "'dim0' is not of type"),
        ([node("a", "aten.transpose.int", X, 0.0, 1)], "'dim0' is not of type"),
        ([node("a", "aten.softmax.int", X, 0, {"device": "model"})], "'dtype' is not of type"),
        ([node("a", "aten.cat.default", [X, None])], "'tensors' is not of type"),
        ([node("a", "sym.add", X)], "exactly 2"),
        ([node("a", "sym.add", 1, "2")], "exactly 2"),
        ([node("a", "aten.add_.Tensor", X, 1)], "writes in place to input x"),
        (
            [node("v", "aten.view.default", X, [-1]), node("a", "aten.add_.Tensor", {"ref": "v"}, 1)],
            "writes in place",
        ),
        ([{"name": "a", "op": "aten.cos.default", "args": [X], "code": "x"}], "unknown field 'code'"),
        ([{"name": "a", "op": "aten.cos.default"}], "lacks 'args'"),
        ([{"name": "a", "op": ["aten"], "args": []}], "no op"),
        (["aten.cos.default"], "must be an object"),
        ([node("a", "aten.arange.default", 1 << 40)], "elements"),
        ([node("a", "aten.new_zeros.default", X, [1 << 20, 1 << 20])], "elements"),
        ([node("a", "aten.mul.Tensor", X, 1 << 70)], "64 bits"),
        ([node("a", "aten.view.default", X, [[1]])], "'size' is not of type"),
    ],
)
def test_what_does_not_fit_is_refused(nodes, words):
    with pytest.raises(ArtifactError, match=words):
        decode(graph(nodes, outputs=[X]))


@pytest.mark.parametrize("outputs", [[], [1], [{"ref": "nothing"}], [{"weight": "w"}], {}])
def test_outputs_must_be_values(outputs):
    raw = graph([node("a", "aten.cos.default", X)])
    raw["outputs"] = outputs
    with pytest.raises(ArtifactError, match="output"):
        decode(raw)


def test_too_many_nodes_are_refused(monkeypatch):
    monkeypatch.setattr("qcompiler.runtime.graph.MAX_NODES", 10)
    with pytest.raises(ArtifactError, match="at most 10"):
        decode(graph([node(f"n{i}", "aten.cos.default", X) for i in range(11)]))


def test_a_missing_weight_is_named():
    raw = graph([node("y", "aten.mul.Tensor", X, {"weight": "w"})], weights=["w"])
    with pytest.raises(ArtifactError, match="'w' is missing"):
        Program(decode(raw), {}, CPU)


def test_every_allowed_op_exists_in_this_torch():
    from qcompiler.runtime.opset import ATEN_OPS, resolve

    for name in sorted(ATEN_OPS):
        assert str(resolve(name, "test")) == name


def test_no_allowed_op_reads_files_resizes_or_draws():
    from qcompiler.runtime.opset import ATEN_OPS, resolve

    for name in ATEN_OPS:
        op = resolve(name, "test")
        assert torch.Tag.nondeterministic_seeded not in op.tags or name == "aten.dropout.default"
        assert not any(word in name for word in ("resize", "set_", "file", "rand", "bernoulli", "_cuda"))
