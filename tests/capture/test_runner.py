"""How a model is captured and called: captures that end, logging, complex streams, sizes."""

import logging

import pytest
import torch
from helpers import (
    ALTERNATE,
    ALWAYS,
    NEVER,
    assert_close,
    assert_identical,
    hits,
    plain,
    sample,
    seeded,
    times,
)
from nets import Net, tokens
from torch import nn
from zoo import SequentialDiT

import fxcache
from fxcache import EasyCache, FirstBlockCache, Taylor

log = logging.getLogger("some.library")


class Counting(SequentialDiT):
    """Keeps a number that a graph depends on, and that is another at each call."""

    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return super().forward(x * (1 + 0 * self.calls), t)


class Logging(SequentialDiT):
    """Says something at each call."""

    def forward(self, x, t):
        log.warning("unknown argument")
        return super().forward(x, t)


@torch._dynamo.config.patch(recompile_limit=3)
def test_a_model_that_is_captured_again_and_again_runs_uncached_in_the_end(caplog):
    model, twin = (seeded(lambda: Counting(depth=2)) for _ in range(2))
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
    model = seeded(Logging)
    for fullgraph in (None, True):
        denoiser = plain(model, NEVER, fullgraph=fullgraph)
        x, t = sample(), times(1.0)
        assert_identical(denoiser(x, t), model(x, t))
        assert denoiser.report().graphs == 1


# --- complex streams ---


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


def test_the_metric_sees_a_change_of_the_imaginary_part_alone():
    model = seeded(Waves)
    denoiser = plain(model, FirstBlockCache(threshold=1e-6))
    denoiser(sample(), times(1.0))
    out = denoiser(sample(seed=1), times(0.5))
    assert hits(denoiser) == [False, False]
    assert denoiser.report().records[-1].metric > 0.1
    assert_identical(out, model(sample(seed=1), times(0.5)))


def test_a_forecast_keeps_the_imaginary_part():
    model = seeded(Waves)
    policy = fxcache.StepSchedule(mask=[False, False, True], forecast=Taylor(order=1))
    denoiser = plain(model, policy)
    for i in range(3):  # inputs that hardly change: any forecast is right
        out = denoiser(sample(), times(1 - 1e-7 * i))
    assert hits(denoiser)[-1]
    assert_close(out, model(sample(), times(1.0)), 1e-5)


# --- dynamic sizes ---


EASY = EasyCache(warmup_steps=0, final_steps=0, threshold=1.0)


@pytest.mark.parametrize("policy", [ALTERNATE, EASY], ids=["blocks", "whole model"])
def test_dynamic_sizes_change_no_decision(policy):
    model = seeded(lambda: Net(depth=2))
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
        denoiser = fxcache.transform(seeded(SequentialDiT), ALWAYS, backend=look)
        denoiser(sample(2, number), times(1.0))
    assert symbolic
    assert not any(symbolic)
    denoiser(sample(2, 16), times(1.0))  # its own second size is a change
    assert any(symbolic)
