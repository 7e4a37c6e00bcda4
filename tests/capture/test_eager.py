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


def test_an_argument_that_nobody_reads_stays_one():
    """A piece is given the part of a tensor that it writes anew, if the head has it already."""
    graph = torch.fx.Graph()
    whole, part, new = (graph.placeholder(name) for name in ("whole", "part", "new"))
    copied = graph.call_function(torch.ops.aten.copy.default, (part, new))
    written = graph.call_function(torch.ops.aten.slice_scatter.default, (whole, copied, 1, 0, 2))
    graph.output((written,))
    given = torch.zeros(2, 4), torch.zeros(2, 2), torch.ones(2, 2)
    for node, value in zip((whole, part, new, copied), (*given, given[2]), strict=True):
        node.meta["val"] = value
    module = compiling.quicken(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert_identical(module(*given)[0], torch.cat([given[2], given[1]], 1))


class Sliced(nn.Module):
    """Linear layers on a tensor whose first two dimensions are none for a single product."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(torch.cat([x, x, x], 1).sin()[:, :8]) + t
        return x


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("is_inference", [True, False])
def test_products_are_computed_as_the_weights_have_it(is_inference, requires_grad):
    """Whether weights want gradients, and whether they can, decides which product a layer is."""
    with torch.inference_mode(is_inference):
        model = seeded(Sliced).requires_grad_(requires_grad)
    x, t = torch.randn(2, 8, 256), torch.ones(1)
    with torch.inference_mode():
        denoiser = fxcache.transform(model, NEVER, backend="eager")
        assert_identical(denoiser(x, t), model(x, t))
