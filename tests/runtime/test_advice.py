"""The advice on the forecast: which of reuse and extrapolation is nearer, at computed steps."""

import logging
import math

import pytest
import torch
from helpers import NEVER, hits, sample, seeded, times
from opened import opened
from torch import nn
from zoo import Denoiser

from fxcache import FirstBlockCache, Reuse, StepSchedule, Taylor
from fxcache.policy.fitted import Fitted


class Shift(nn.Module):
    """Adds a constant that is a function of the time, so the errors of forecasts are known."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, h, shift):
        return h + self.linear(h) + shift


class Moving(Denoiser):
    """A residual that is `curve` of the time input everywhere, over the blocks behind the first."""

    curve = staticmethod(lambda t: t)

    def __init__(self, width=16):
        super().__init__(width)
        self.blocks = nn.ModuleList(Shift(width) for _ in range(4))

    def forward(self, x, t):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.curve(t)[:, None, None])
        return self.out(h)


def run(policy, curve, steps=9):
    model = seeded(Moving)
    model.curve = curve
    denoiser = opened(model, policy, audit=False)
    with torch.no_grad(), denoiser.trajectory(num_steps=steps):
        for step in range(steps):
            denoiser(sample(), times(steps - step))
    return denoiser


EVERY_THIRD = [False, False, False, True, True, False, True, True, False]


@pytest.mark.parametrize("curve", [lambda t: t, lambda t: 5 + 0.1 * t * t])
def test_both_figures_are_those_of_the_residuals(curve, caplog):
    caplog.set_level(logging.INFO, "fxcache")
    advice = run(StepSchedule(mask=EVERY_THIRD, forecast=Reuse()), curve).report().advice
    # By hand: the residual of step s is r(9 - s), computed at 0, 1, 2, 5, 8.
    computed = [0, 1, 2, 5, 8]
    r = [float(curve(torch.tensor(9.0 - s))) for s in computed]
    reuse = line = size = 0.0
    for k in range(2, len(computed)):
        slope = (r[k - 1] - r[k - 2]) / (computed[k - 1] - computed[k - 2])
        reuse += abs(r[k] - r[k - 1])
        line += abs(r[k] - r[k - 1] - slope * (computed[k] - computed[k - 1]))
        size += abs(r[k])
    assert f"forecast=Taylor(order=1) would have been off by {line / size:.1%}" in advice
    assert f"Reuse() by {reuse / size:.1%}" in advice
    assert advice in caplog.messages


def test_what_jumps_is_better_reused():
    jump = lambda t: 10.0 + torch.cos(math.pi * t)  # noqa: E731 - there and back each step
    policy = StepSchedule(mask=[False, False] * 4 + [True], forecast=Taylor(order=1))
    assert "forecast=Reuse()" in run(policy, jump).report().advice


@pytest.mark.parametrize(
    "policy",
    [
        StepSchedule(mask=EVERY_THIRD, forecast=Taylor(order=1)),
        StepSchedule(mask=EVERY_THIRD, forecast=Fitted(table={})),
        NEVER,
    ],
)
def test_no_advice_where_the_own_is_as_good(policy):
    assert run(policy, lambda t: t).report().advice is None


def test_only_the_first_trajectory_is_looked_at():
    denoiser = run(StepSchedule(mask=EVERY_THIRD, forecast=Reuse()), lambda t: t)
    assert denoiser.session.advice is None  # and with it the copies
    before = denoiser.report().advice
    denoiser.model.curve = lambda t: 0 * t
    with torch.no_grad(), denoiser.trajectory(num_steps=9):
        for step in range(9):
            denoiser(sample(), times(9 - step))
    assert denoiser.report().advice == before
    assert sum(hits(denoiser)) == 8
    denoiser.reset()
    assert denoiser.report().advice is None


def test_it_is_in_the_table_and_in_the_json():
    policy = FirstBlockCache(threshold=math.inf, max_consecutive_hits=1)
    report = run(policy, lambda t: t).report()
    assert report.advice
    assert report.advice in str(report)
    assert report.to_dict()["advice"] == report.advice
