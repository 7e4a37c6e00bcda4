"""Pieces that nothing compiles call what the model calls. (How much of it in whole models:
`test_zoo`.)"""

import pytest
import torch
from helpers import NEVER, assert_identical, seeded
from torch import nn

import fxcache
from fxcache.capture import compile as compiling


class Shapes(nn.Module):
    """Linear layers on 2, 3 and 4 dimensions, with and without a bias, and half of a tensor set."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 16), nn.Linear(16, 4)
        self.plain, self.whole = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, t):
        h = self.embed(x) + t[:, None, None]
        for block in self.blocks:
            turned = torch.empty_like(h)
            turned[..., 0::2] = -h[..., 1::2]
            turned[..., 1::2] = h[..., 0::2]
            pooled = self.plain(turned.mean(1)) + self.whole(turned.mean(1))
            h = h + torch.tanh(block(turned[:, None]))[:, 0] + self.plain(turned.transpose(0, 1)).mT
            heads = h.unflatten(
                -1, (4, 4)
            )  # all at once: no layer over the last of four dimensions
            pooled = pooled + self.plain(heads.reshape(-1, 16)).view_as(heads).flatten(2).mean(1)
            h = h + pooled[:, None]
        return self.out(h)


@pytest.fixture
def quickened(monkeypatch):
    graphs = []

    def quicken(module):
        graphs.append(original(module).graph)
        return module

    original = compiling.quicken
    monkeypatch.setattr(compiling, "quicken", quicken)
    return graphs


def test_linear_layers_are_called_as_they_were(quickened):
    model = seeded(Shapes)
    x, t = torch.randn(16, 16, 4), torch.ones(16)
    with torch.no_grad():
        denoiser = fxcache.transform(model, NEVER, backend="eager")
        assert_identical(denoiser(x, t), model(x, t))
    targets = [node.target for graph in quickened for node in graph.nodes]
    assert torch.ops.aten.addmm.default not in targets
    assert torch.ops.aten.copy.default not in targets
    assert targets.count(torch.nn.functional.linear) >= 10
