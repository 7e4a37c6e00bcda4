"""The functional graph, bit for bit the model, and what pieces that nothing compiles call."""

import pytest
import torch
from comparing import assert_identical
from controlled import Controlled, control
from helpers import sample, seeded, times
from policies import NEVER
from torch import nn
from zoo import SequentialDiT, token_inputs

import fxcache
from fxcache.capture import compile as compiling
from fxcache.capture import torch_internals as internals
from fxcache.capture.functional import functionalized
from fxcache.passes.facts import analyse
from fxcache.passes.graph import dotted_path, op_name
from fxcache.passes.units import find_runs


def captured(model, inputs, **options):
    """The functional graph of `model`, what its placeholders are, and what it gives."""
    found = []

    def backend(gm, example_inputs):
        def compile_graph(functional, given):
            found.append((functional, given))
            return functional

        return functionalized(gm, example_inputs, compile_graph)

    outputs = torch.compile(model, backend=backend, fullgraph=True, **options)(**inputs)
    ((gm, given),) = found
    return gm, given, outputs


def test_all_private_names_of_torch_are_there():
    for name in internals.__all__:
        assert getattr(internals, name) is not None
    assert internals.InductorWrapper.compiler_name == "inductor"
    with internals.capturing(more=True):
        assert torch._dynamo.config.capture_scalar_outputs
    assert not torch._dynamo.config.capture_scalar_outputs


def test_torch_is_left_as_it_was():
    """What a trace would replace is kept while ours runs, and put back."""
    ops = [torch.ops.aten.upsample_nearest2d.default, torch.ops.aten.matmul.default]
    before = [dict(op.py_kernels) for op in ops]
    assert all(before)
    with internals.keeping_operations():
        assert not any(set(op.py_kernels) & set(internals._PYTHON_KEYS) for op in ops)
    assert [dict(op.py_kernels) for op in ops] == before
    with pytest.raises(RuntimeError, match="amid"), internals.keeping_operations():
        raise RuntimeError("amid a trace")
    assert [dict(op.py_kernels) for op in ops] == before


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']._modules['blocks'].0.attn", "blocks.0.attn"),
        ("L['model'].__dict__['_modules']['transformer_blocks'].3", "transformer_blocks.3"),
        ("L['self'].blocks[2].mlp", "blocks.2.mlp"),
        ("L['self']._modules['blocks']._modules['1']._orig_mod.proj", "blocks.1.proj"),
        ("L['self']", ""),
    ],
)
def test_module_paths(path, expected):
    assert dotted_path(path) == expected


class Writing(SequentialDiT):
    """In-place streams, a context, a counter in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def stack(self, h):
        self.calls += 1
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                h += 0.1 * block(h)
                h[:, 0] = 0
        return h


def test_writes_and_contexts_are_gone():
    model = seeded(Writing)
    inputs = token_inputs()
    gm, given, outputs = captured(model, inputs)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert not [n for n in calls if op_name(n).endswith("_") or op_name(n).startswith("_enter_")]
    assert [given.sources[node].rpartition("'calls'")[1] for node in given.written] == ["'calls'"]
    assert model.calls == 1
    assert_identical(outputs, seeded(Writing)(**inputs))
    assert set(given.data.values()) == {"x", "t"}
    assert given.data[given.timestep] == "t"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_graph_gives_the_models_own_bits(mode):
    model = seeded(lambda: SequentialDiT(depth=1))
    with mode():
        inputs = {"x": sample(batch=3), "t": times(0.5, 3)}
        assert_identical(captured(model, inputs, dynamic=True)[2], model(**inputs))


def test_the_weights_are_known():
    inputs = {"control": control(), "features": control(seed=4), "strength": torch.ones(())}
    inputs = {**token_inputs(), **inputs}
    gm, given, _ = captured(seeded(Controlled), inputs)
    assert set(given.paths.values()) == {"x", "t", "control", "features", "strength"}
    assert len(given.weights) == len(given.registered)
    assert len(gm.graph.find_nodes(op="placeholder")) == len(given.weights) + len(given.data)


def test_facts_of_a_graph():
    gm, given, _ = captured(seeded(SequentialDiT), token_inputs())
    facts = analyse(gm.graph, given)
    assert [given.data[node] for node in facts.samples] == ["x"]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        seeded(SequentialDiT)(**token_inputs())
    time_layer = 2 * 2 * 1 * 16  # which does not depend on the sample
    assert facts.total == counter.get_total_flops() - time_layer
    (run,) = find_runs(facts)
    assert [unit.label for unit in run.units] == [f"blocks.{i}" for i in range(4)]
    assert all(facts.width[unit.end] == 2 * 8 * 16 * 4 for unit in run.units)
    for p, node in enumerate(facts.nodes):
        closure = facts.needs(node)
        assert closure >> p & 1
        assert all(closure >> q & 1 for q in facts.operands[p])


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
            heads = h.unflatten(-1, (4, 4))  # at once: no layer over the last of four dimensions
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
