"""Reports: records, JSON, table and picture; the advice on the forecast, and the audit."""

import json
import logging
import math

import pytest
import torch
from comparing import assert_identical
from helpers import hits, plain, sample, seeded, solve, times
from opened import Small, opened
from policies import ALWAYS, NEVER
from torch import nn
from zoo import Denoiser, token_inputs

import fxcache
from fxcache import FirstBlockCache, Reuse, StepSchedule, Taylor
from fxcache.policy.fitted import Fitted
from fxcache.runtime import audit


@pytest.fixture(scope="module")
@torch.no_grad()
def report():
    denoiser, given = plain(seeded(Small)), token_inputs()
    for t in (1.0, 0.9):
        for branch in ("cond", "uncond"):
            with denoiser.branch(branch):
                denoiser(given["x"], torch.full((2,), t))
    denoiser(given["x"] * math.nan, torch.full((2,), 0.8))
    return denoiser.report()


def test_counts(report):
    assert (report.hits, report.misses) == (2, 3)
    assert report.hit_rate == pytest.approx(0.4)
    assert (report.graphs, report.recompiles) == (1, 0)
    # Three branches, each a residual and a reference of 2 x 8 x 16 float32.
    assert report.cached_bytes == 3 * 2 * 2 * 8 * 16 * 4


def test_to_dict_is_json(report):
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["hits"] == 2
    assert {"step", "branch", "timestep", "metric", "is_hit", "reason"} <= set(data["records"][0])
    assert [r["branch"] for r in data["records"]] == ["cond", "uncond"] * 2 + [None]
    assert data["records"][0]["reason"] == "nothing cached"
    assert data["records"][2] == data["records"][2] | {"is_hit": True, "reason": None, "step": 1}
    assert data["records"][0]["metric"] is None


def test_the_table_and_the_picture(report, tmp_path):
    text = str(report)
    assert text.count("miss (nothing cached)") == 3
    assert "2 hits, 3 misses (40%)" in text
    path = report.plot(tmp_path / "diff.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics_are_residual_diffs(model):
    denoiser = plain(model, FirstBlockCache(threshold=1e-9))
    first, second = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    t = torch.ones(2)
    residuals = []
    for x in (first, second):
        denoiser(x, t)
        h = model.embed(x) + model.time(t[:, None])[:, None]
        residuals.append((model.blocks[0](h) - h).double())
    before, after = residuals
    expected = (after - before).abs().mean() / before.abs().mean()
    assert denoiser.report().records[1].metric == pytest.approx(float(expected), rel=1e-5)


def test_an_empty_report_and_the_log(denoiser, caplog):
    report = denoiser.report()
    assert (report.hits, report.misses, report.hit_rate) == (0, 0, 0.0)
    assert "0 hits" in str(report)
    with caplog.at_level(logging.INFO, "fxcache"):
        denoiser(**token_inputs())
    assert "1 of 2 units" in caplog.text


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


class Against(Small):
    """The blocks' residual moves against the stream, and by more: reuse follows the wrong way."""

    def stack(self, h):
        h = self.blocks[0](h)
        for _ in range(5):
            h = h - 20 * torch.tanh(h / 10) + 0.01 * self.blocks[1].proj(self.blocks[1].up(h))
        return h


def test_a_right_cut_passes_and_is_shown(model, caplog):
    caplog.set_level(logging.WARNING, "fxcache")
    denoiser = plain(model)
    solve(denoiser, 4)
    report = denoiser.report()
    assert 0 < report.audit < 1
    assert report.to_dict()["audit"] == report.audit
    assert "audit" in str(report)
    assert hits(denoiser) == [False, True, True, True]
    assert not [r for r in caplog.records if "nothing is reused" in r.message]


def test_what_does_not_follow_the_sample_is_not_used(caplog):
    model = seeded(Against)
    denoiser = plain(model)
    outputs = solve(denoiser, 4)
    assert denoiser.report().audit >= audit.LIMIT
    assert hits(denoiser) == [False] * 4
    assert [r.reason for r in denoiser.report().records[1:]] == ["audit"] * 3
    assert_identical(outputs, solve(model, 4))
    warnings = [r.message for r in caplog.records if "nothing is reused" in r.message]
    assert len(warnings) == 1
    assert "audit=False" in warnings[0]


class Still(Small):
    """Each block takes its input away again: nothing of the stream is left."""

    def stack(self, h):
        for block in self.blocks:
            h = (h + torch.tanh(block.proj(block.up(h)))) + (-h)
        return h


def test_a_hit_that_stands_still_is_not_used(caplog):
    denoiser = plain(seeded(Still))
    solve(denoiser, 4)
    assert hits(denoiser) == [False] * 4
    assert [r.reason for r in denoiser.report().records[1:]] == ["audit"] * 3
    assert any("did not move at all" in r.message for r in caplog.records)


def test_it_can_be_left_out_and_is_where_nothing_hits(model):
    denoiser, never = plain(seeded(Against), audit=False), plain(model, NEVER)
    solve(denoiser, 4), solve(never, 3)
    assert denoiser.report().audit is never.report().audit is None
    assert hits(denoiser) == [False, True, True, True]


def test_it_leaves_no_trace(model):
    """Neither in what is cached, nor in the random numbers, nor in the records."""
    policy = FirstBlockCache(threshold=torch.inf, warmup_steps=2, forecast=Taylor(order=1))
    with_audit, without = plain(model, policy), plain(model, policy, audit=False)
    torch.manual_seed(3)
    assert_identical(solve(with_audit, 6), solve(without, 6))
    drawn = torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(3), drawn)
    assert len(with_audit.report().records) == 6


def test_what_is_not_finite_cannot_be_judged_and_is_tried_again(denoiser):
    denoiser(sample() * torch.nan, times(1.0))
    assert denoiser.report().audit is None
    denoiser(sample(), times(0.9))
    assert 0 < denoiser.report().audit < 1


def test_a_constant_sample_is_moved_too_and_explain_shows_it(model, denoiser):
    denoiser(torch.zeros(2, 8, 4), times(1.0))
    assert 0 < denoiser.report().audit < 1
    other = plain(model)
    other(torch.ones(2, 8, 4), times(1.0))
    assert 0 < other.report().audit < 1
    found = fxcache.explain(model, sample(), times(1.0), policy=ALWAYS)
    assert 0 < found.audit < 1
    assert "below 1 it follows" in str(found)
