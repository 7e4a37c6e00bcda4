"""The compiled path: same numbers, two regions a step, no recompiles."""

import itertools
import math

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_close, hits, plain, sample, seeded, times
from torch import nn
from zoo import Denoiser, SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import FirstBlockCache, StepSchedule, Taylor
from fxcache.capture.compile import compile_pieces
from fxcache.runtime.regions import Compiled


@pytest.mark.slow
def test_inductor_computes_what_eager_does():
    pytest.importorskip("diffusers")
    model, inputs = make("wan_vace", vace_layers=[0], num_layers=2)
    policy = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=Taylor(order=1))
    compiled, eager = fxcache.transform(model, policy), plain(model, policy)
    for step in range(4):
        given = at_step("wan_vace", inputs, step)
        assert_close(compiled(**given), eager(**given), tolerance=1e-4)
    assert hits(compiled) == hits(eager) == [False, False, True, True]
    report = compiled.report()
    assert (report.graphs, report.recompiles) == (1, 0)


@pytest.mark.slow
def test_a_warm_start_finds_every_piece_on_disk():
    """Whether blocks are outlined or not. A miss is what torch.compile computes."""
    counters = torch._dynamo.utils.counters["aot_autograd"]
    policy = FirstBlockCache(threshold=math.inf, forecast=Taylor(order=1))
    given = {"x": sample(), "t": times(1.0)}
    for outline, start in itertools.product((True, False), ("cold", "warm")):
        torch._dynamo.reset()
        counters.clear()
        model = seeded(lambda: SequentialDiT(depth=3))
        output = fxcache.transform(model, policy, outline=outline)(**given)
        assert counters["autograd_cache_bypass"] == 0, (outline, start)
        if start == "warm":
            assert counters["autograd_cache_hit"] > 0, outline
            assert counters["autograd_cache_miss"] == 0, outline
            assert_close(output, torch.compile(model, fullgraph=True)(**given))


def test_two_regions_a_step(model, monkeypatch):
    """head, then hit or miss: nothing else is called in a step."""
    called = []

    def spy(*args):
        compiled = compile_pieces(*args)
        regions = {}
        for name in ("head", "hit", "miss"):
            region = getattr(compiled, name)
            regions[name] = lambda *a, n=name, r=region: (called.append(n), r(*a))[1]
        return Compiled(**regions)

    monkeypatch.setattr(fxcache.capture.rewrite, "compile_pieces", spy)
    denoiser = plain(model, ALWAYS, audit=False)
    for _ in range(3):
        denoiser(**token_inputs())
    assert called == ["head", "miss", "head", "hit", "head", "hit"]


class Lengths(Denoiser):
    """A sequence whose length is a formula of the input's: half of it, four times."""

    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(9)]
        self.blocks = nn.ModuleList(nn.Sequential(*layers[i::3]) for i in range(3))

    def stack(self, h):
        length = h.shape[1]
        h = torch.cat([h.unflatten(1, (length // 2, 2)).mean(2)] * 4, 1)
        for block in self.blocks:
            h = h + block(h)
        return h[:, : length // 2].repeat_interleave(2, 1)


@pytest.mark.slow
def test_dynamic_shapes_share_one_compilation():
    model = seeded(Lengths)
    denoiser = fxcache.transform(model, StepSchedule(mask=[False, True]), dynamic=True)
    for batch, tokens in ((2, 8), (3, 8), (2, 12), (4, 16)):
        x = sample(batch, tokens)
        for t in (1.0, 1 - 1e-6):  # another step
            assert_close(denoiser(x, times(t, batch)), model(x, times(t, batch)))
    assert hits(denoiser) == [False, True] * 4
    assert (denoiser.report().graphs, denoiser.report().recompiles) == (1, 0)


def test_guards_may_be_filtered(model):
    skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    options = {"guard_filter_fn": skip}
    denoiser = plain(model, NEVER, options=options)
    given = token_inputs()
    assert_close(denoiser(**given), model(**given))
    assert options == {"guard_filter_fn": skip}  # torch.compile empties what it is given


@pytest.mark.slow
def test_sizes_that_depend_on_data():
    """Of text tokens that a mask selects."""
    pytest.importorskip("diffusers")
    model, inputs = make("hunyuan_framepack", num_layers=1, num_single_layers=1)
    denoiser = fxcache.transform(model, ALWAYS)
    for _ in range(2):
        assert_close(denoiser(**inputs), model(**inputs), tolerance=1e-4)
    assert hits(denoiser) == [False, True]
