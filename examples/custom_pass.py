"""A pass of your own in your own FX pipeline: the pattern relu(x)² becomes one op that you bring.

python examples/custom_pass.py
"""

import torch
from torch import nn

from qcompiler.passes import Pass, PassManager, PassResult, calls, canonical_passes, insert_call, replace

aten = torch.ops.aten


@torch.library.custom_op("example::squared_relu", mutates_args=())
def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)² (So et al. 2021, "Primer"); a Triton kernel would be registered for "cuda" beside this."""
    return x.relu().square()


@squared_relu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class FuseSquaredReLU(Pass):
    """`relu(x) ** 2` → `example::squared_relu`."""

    name = "fuse_squared_relu"
    required = True  # the manager raises if nothing matched
    api = (1, 0)

    def apply(self, gm: torch.fx.GraphModule, result: PassResult) -> None:
        """Match by hand, say why not, insert the new call with its value."""
        for node in list(gm.graph.nodes):
            if not (calls(node, aten.pow.Tensor_Scalar) and node.args[1] == 2):
                continue
            if not calls(node.args[0], aten.relu.default):
                continue
            if len(node.args[0].users) > 1:
                result.skip(node, "relu(x) is read elsewhere too")
                continue
            with gm.graph.inserting_before(node):
                op = torch.ops.example.squared_relu.default
                replace(node, insert_call(gm.graph, op, (node.args[0].args[0],), like=node))
            result.matched += 1


class Primer(nn.Sequential):
    """A feed-forward block: up, relu², down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self[1](self[0](x).relu() ** 2)


if __name__ == "__main__":
    model, x = Primer(nn.Linear(64, 256), nn.Linear(256, 64)).eval(), torch.randn(3, 64)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    for done in PassManager([*canonical_passes(), FuseSquaredReLU()]).run(graph):
        print(f"{done.name:30} {done.matched} matched")
    torch.testing.assert_close(graph(x), model(x))
