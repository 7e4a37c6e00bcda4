"""How a model is captured, compiled and called: captures that end, complex streams, sizes."""

import itertools
import logging
import math

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import hits, plain, sample, seeded, times
from nets import Net, tokens
from opened import Small
from policies import ALTERNATE, ALWAYS, NEVER
from torch import nn
from zoo import Denoiser, SequentialDiT, at_step, make, token_inputs

import fxcache
from fxcache import EasyCache, FirstBlockCache, StepSchedule, Taylor
from fxcache.capture.compile import compile_pieces
from fxcache.runtime.regions import Compiled

log = logging.getLogger("some.library")


class Counting(Small):
    """Keeps a number that a graph depends on, and that is another at each call."""

    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return super().forward(x * (1 + 0 * self.calls), t)


@torch._dynamo.config.patch(recompile_limit=3)
def test_a_model_that_is_captured_again_and_again_runs_uncached_in_the_end(caplog):
    model, twin = (seeded(Counting) for _ in range(2))
    denoiser = plain(model, ALWAYS)
    for run in range(3):
        for i in range(4):
            x, t = sample() * (1 - i / 20), times(1 - i / 10)
            out = denoiser(x, t)
            if not denoiser.report().records[-1].is_hit or run == 2:
                assert_identical(out, twin(x, t))
    assert denoiser.report().graphs <= 7
    said = [r.message for r in caplog.records if "runs uncached from here on" in r.message]
    assert len(said) == 1
    assert "calls" in said[0]
    reasons = {r.reason for r in denoiser.report().records} - {None}
    assert reasons <= {"nothing cached", "a number of the model changed"}


def test_logging_in_forward_is_captured_around():
    class Logging(Small):
        def forward(self, x, t):
            log.warning("unknown argument")
            return super().forward(x, t)

    model = seeded(Logging)
    for fullgraph in (None, True):
        denoiser = plain(model, NEVER, fullgraph=fullgraph)
        x, t = sample(), times(1.0)
        assert_identical(denoiser(x, t), model(x, t))
        assert denoiser.report().graphs == 1


class Waves(nn.Module):
    """A complex stream, whose blocks change both parts."""

    def __init__(self):
        super().__init__()
        self.i, self.o = nn.Linear(4, 8), nn.Linear(8, 4)
        self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.g = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.constant = nn.Parameter(torch.randn(8))

    def forward(self, x, t):
        h = self.i(x) * t[:, None, None]
        z = torch.complex(self.constant.expand_as(h), h)
        for f, g in zip(self.f, self.g, strict=True):
            z = torch.complex(z.real + f(z.real).tanh(), z.imag + g(z.imag).tanh())
        return self.o(z.imag)


def test_the_metric_and_a_forecast_see_the_imaginary_part():
    model = seeded(Waves)
    denoiser = plain(model, FirstBlockCache(threshold=1e-6))
    denoiser(sample(), times(1.0))
    out = denoiser(sample(seed=1), times(0.5))
    assert hits(denoiser) == [False, False]
    assert denoiser.report().records[-1].metric > 0.1
    assert_identical(out, model(sample(seed=1), times(0.5)))
    policy = fxcache.StepSchedule(mask=[False, False, True], forecast=Taylor(order=1))
    denoiser = plain(model, policy)
    for i in range(3):  # inputs that hardly change: any forecast is right
        out = denoiser(sample(), times(1 - 1e-7 * i))
    assert hits(denoiser)[-1]
    assert_close(out, model(sample(), times(1.0)), 1e-5)


EASY = EasyCache(warmup_steps=0, final_steps=0, threshold=1.0)


@pytest.mark.parametrize("policy", [ALTERNATE, EASY], ids=["blocks", "whole model"])
def test_dynamic_sizes_change_no_decision(policy):

    class Sized(Net):
        """Sizes of the sequence are asked for again and again."""

        def stack(self, h, t):
            for block in self.blocks:
                h = h + block.down(
                    block(h, t).reshape(*h.shape[:2], 2, -1).flatten(2).repeat(1, 1, 2)
                )
            return h

    model = seeded(lambda: Sized(depth=2))
    static, dynamic = plain(model, policy, dynamic=False), plain(model, policy, dynamic=True)
    for length in (8, 6):
        for i in range(4):
            x, t = tokens(i)
            x = x[:, :length]
            assert_close(dynamic(x, t), static(x, t), 1e-6)
    shown = [
        [(r.trajectory, r.step, r.is_hit, r.reason) for r in d.report().records]
        for d in (static, dynamic)
    ]
    assert shown[0] == shown[1]
    assert set(hits(static)) == {True, False}


def test_sizes_of_one_model_say_nothing_of_anothers():
    """Dynamo would take a second model's first size for a change, and make its graphs dynamic."""
    symbolic = []

    def look(gm, given):
        symbolic.append(any(isinstance(value, torch.SymInt) for value in given))
        return gm

    for number in (8, 12):
        denoiser = fxcache.transform(seeded(Small), ALWAYS, backend=look)
        denoiser(sample(2, number), times(1.0))
    assert symbolic
    assert not any(symbolic)
    denoiser(sample(2, 16), times(1.0))  # its own second size is a change
    assert any(symbolic)


@pytest.mark.slow
def test_inductor_computes_what_eager_does():
    """Of several streams, two kinds of blocks and a forecast."""
    model, inputs = make("structured_dit")
    policy = FirstBlockCache(threshold=math.inf, warmup_steps=2, forecast=Taylor(order=1))
    compiled, eager = fxcache.transform(model, policy), plain(model, policy)
    for step in range(4):
        given = at_step("structured_dit", inputs, step)
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
    for batch, length in ((2, 8), (3, 8), (2, 12), (4, 16)):
        x = sample(batch, length)
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


class Selecting(Small):
    """Text tokens that a mask selects stand before the image's, as in HunyuanVideo FramePack."""

    def stack(self, h):
        text = self.text[self.mask].expand(len(h), -1, -1)
        return super().stack(torch.cat([text, h], 1))[:, len(text[0]) :]

    def forward(self, x, t, text, mask):
        self.text, self.mask = self.embed(text), mask
        return super().forward(x, t)


@pytest.mark.slow
def test_sizes_that_depend_on_data():
    model = seeded(Selecting)
    given = sample(), times(1.0), torch.randn(6, 4), torch.arange(6) % 2 == 0
    denoiser = fxcache.transform(model, ALWAYS)
    for _ in range(2):
        assert_close(denoiser(*given), model(*given), tolerance=1e-4)
    assert hits(denoiser) == [False, True]
