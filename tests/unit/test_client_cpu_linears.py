"""Linear layers arranged for the CPU compute what they computed before."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from sidepool.client.cpu_linears import PACKED_BATCH, fuse_linears


class Net(nn.Module):
    """Linear layers with and without ReLU, one whose result is read twice, one over three dimensions, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(13, 32), nn.Linear(32, 20), nn.Linear(20, 1)
        self.cube, self.bare = nn.Linear(4, 16), nn.Linear(20, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(torch.relu_(self.a(x)))
        shared = hidden.relu() + hidden
        cube = self.cube(shared.view(-1, 5, 4)).sum((1, 2))
        score: Tensor = self.c(shared) + cube.unsqueeze(1) + self.bare(shared).sum(1, keepdim=True)
        return score


@pytest.mark.parametrize("batch", [1, PACKED_BATCH - 1, PACKED_BATCH, 100])
def test_fused_linears_give_the_same_results(batch: int) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export warns about itself
        example = (torch.randn(4, 13),)
        exported = torch.export.export(net, example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
        module = exported.module(check_guards=False)
    held = {node.target: module.get_parameter(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    assert fuse_linears(module.graph, held) == 3
    module.recompile()
    remaining = [node for node in module.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(remaining) == 2
    x = torch.randn(batch, 13)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), net(x), rtol=1e-5, atol=1e-5)
