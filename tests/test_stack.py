"""What the pass finds: stacks, streams, spans, and the edges of a graph that is not functional."""

import pytest
import torch
from helpers import ALWAYS
from torch import nn
from zoo import Block, Denoiser, SequentialDiT, token_inputs

import fxcache
from fxcache.capture import dotted_path, graph_inputs, module_calls
from fxcache.dataflow import data_flow, residual_path, split_writes, writes_in_place
from fxcache.integrations.tiny import tiny_model
from fxcache.passes.branch import build_pieces
from fxcache.passes.cut import cut
from fxcache.policy import Span
from fxcache.policy.probe import HeadResidual
from fxcache.stack import find_stack, node_flops


def captured(model, inputs):
    """The graph that Dynamo hands to a backend."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    (gm,) = graphs
    return gm


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']._modules['blocks'].0.attn", "blocks.0.attn"),
        ("L['model'].__dict__['_modules']['transformer_blocks'].3", "transformer_blocks.3"),
        ("L['self'].blocks[2].mlp", "blocks.2.mlp"),
        ("transformer_blocks.1.ff", "transformer_blocks.1.ff"),
        ("L['self']", ""),
    ],
)
def test_module_paths_of_both_dialects(path, expected):
    assert dotted_path(path) == expected


def test_the_graph_of_the_backend_is_not_changed():
    gm = captured(SequentialDiT().eval(), token_inputs())
    before = str(gm.graph)
    inputs, flow = graph_inputs(gm.graph), data_flow(gm.graph)
    stack = find_stack(gm.graph, flow)
    found = cut(gm.graph, stack, flow, inputs, span=Span(1), probe=HeadResidual())
    pieces = build_pieces(gm, found, flow, ring=1)
    assert str(gm.graph) == before
    for piece in (pieces.head, pieces.hit, pieces.miss):
        piece.module.graph.lint()
        assert len(piece.arguments) == len(piece.module.graph.find_nodes(op="placeholder"))


def test_roles_cover_the_graph_once():
    torch.manual_seed(0)
    gm = captured(*tiny_model("WanVACETransformer3DModel", vace_layers=[0, 1]))
    flow = data_flow(gm.graph)
    stack = find_stack(gm.graph, flow)
    found = cut(gm.graph, stack, flow, graph_inputs(gm.graph), span=Span(1), probe=HeadResidual())
    roles = [*found.head, *found.span, *found.tail]
    assert len(roles) == len(set(roles))
    assert not set(found.span) & flow.ancestors(found.head)
    # A control branch that only the span reads is part of it, wherever it was recorded.
    owners = {calls[0].path for node in found.span if (calls := module_calls(node))}
    assert owners == {"vace_blocks.1", "blocks.1", "blocks.2"}


class Refined(Denoiser):
    """Refiners beside the stack: their tokens are put together with others before it."""

    def __init__(self):
        super().__init__()
        self.noise_refiner = nn.ModuleList(Block(16) for _ in range(2))
        self.context_refiner = nn.ModuleList(Block(16) for _ in range(2))
        self.layers = nn.ModuleList(Block(16) for _ in range(3))

    def stack(self, h):
        context = h.flip(1)
        for block in self.noise_refiner:
            h = block(h)
        for block in self.context_refiner:
            context = block(context)
        joint = torch.cat([context, h], dim=1)
        for block in self.layers:
            joint = block(joint)
        return joint[:, h.shape[1] :]


class Continued(Denoiser):
    """Two lists that hand the same stream on are one stack."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Block(16) for _ in range(2))
        self.second = nn.ModuleList(Block(16) for _ in range(3))

    def stack(self, h):
        for block in (*self.first, *self.second):
            h = block(h)
        return h


class Interleaved(Continued):
    """Spatial and temporal blocks in turn."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Block(16) for _ in range(3))

    def stack(self, h):
        for spatial, temporal in zip(self.first, self.second, strict=True):
            h = temporal(spatial(h).transpose(0, 1)).transpose(0, 1)
        return h


class Wrapped(nn.Sequential):
    """The whole model is a list: embed, blocks, head."""

    def __init__(self):
        blocks = nn.Sequential(*(Block(16) for _ in range(4)))
        super().__init__(
            nn.Linear(4, 16), blocks, nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
        )

    def forward(self, x, t):
        return super().forward(x + t[:, None, None])


class Parallel(SequentialDiT):
    """A projection a block, side by side: none feeds the next."""

    def __init__(self):
        super().__init__()
        self.taps = nn.ModuleList(Block(16) for _ in range(4))

    def stack(self, h):
        total = 0
        for block, tap in zip(self.blocks, self.taps, strict=True):
            h = block(h)
            total = total + tap(h)
        return h + total


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        (Refined(), "layers (3)"),
        (Continued(), "first (2) + second (3)"),
        (Interleaved(), "first (3) + second (3)"),
        (Wrapped(), "1 (4)"),
        (Parallel(), "blocks (4)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_stacks(model, stack):
    inputs = token_inputs()
    found = fxcache.explain(model.eval(), **inputs)
    assert found.stack == stack
    denoiser = fxcache.transform(model, ALWAYS, backend="eager")
    first = denoiser(**inputs)
    torch.testing.assert_close(first, model(**inputs), rtol=0, atol=0)
    torch.testing.assert_close(denoiser(**inputs), first)


def test_explain_says_what_a_hit_skips():
    found = fxcache.explain(SequentialDiT(depth=10).eval(), **token_inputs())
    assert found.head_blocks == ("blocks.0",)
    assert found.blocks == tuple(f"blocks.{i}" for i in range(10))
    assert 0.85 < found.skipped_share < 0.9
    assert found.timestep == "t"
    assert "a hit skips" in str(found)
    assert str(found.streams[0]).endswith("[2, 8, 16] float32, cached residual")


def test_explain_says_why_there_is_no_stack():
    found = fxcache.explain(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 8, 4))
    assert found.stack is None
    assert "plain layer" in str(found)


def test_explain_leaves_policy_errors_alone():
    with pytest.raises(fxcache.PolicyError, match="leave no span"):
        fxcache.explain(
            SequentialDiT().eval(), policy=fxcache.FirstBlockCache(head_blocks=7), **token_inputs()
        )


def test_flops_are_torchs_own():
    gm = captured(SequentialDiT().eval(), token_inputs())
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        SequentialDiT().eval()(**token_inputs())
    assert sum(map(node_flops, gm.graph.nodes)) == counter.get_total_flops()


def test_in_place_writes_are_edges():
    def function(x):
        a = x + 1
        view = a[0]
        before = a * 2
        view.mul_(3)
        after = a * 2
        return before, after

    (gm,) = [captured(Function(function), {"x": torch.ones(2, 2)})]
    flow = data_flow(gm.graph)
    nodes = {node.name: node for node in gm.graph.nodes}
    write = next(node for node in gm.graph.nodes if writes_in_place(node))
    assert write in flow.sources[nodes["after"]]
    assert nodes["before"] in flow.sources[write]
    assert flow.writers_of(nodes["a"]) == [write]
    assert flow.writers_of(nodes["after"]) == []
    assert split_writes(flow, nodes["a"], {nodes["before"]}) == ([], [write])
    assert split_writes(flow, nodes["a"], {nodes["after"]}) == ([write], [])


def test_the_residual_path_follows_slices_exactly():
    def function(text, image, weight):
        joint = torch.cat([text, image], 1)
        joint = joint + joint @ weight
        return joint[:, :4], joint[:, 4:]

    inputs = {"text": torch.ones(1, 4, 8), "image": torch.ones(1, 4, 8), "weight": torch.ones(8, 8)}
    gm = captured(Function(function), inputs)
    text, image, _ = graph_inputs(gm.graph).data
    first, second = gm.graph.output_node().args[0]
    assert residual_path(first, {text, image}) == {text}
    assert residual_path(second, {text, image}) == {image}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, **kwargs):
        return self.function(**kwargs)
