"""The audit: what is cached is tried on a moved sample before it is used."""

import logging

import pytest
import torch
from helpers import ALWAYS, NEVER, assert_identical, hits, plain, sample, seeded, solve, times
from opened import Small
from zoo import SequentialDiT

import fxcache
from fxcache import FirstBlockCache, Taylor
from fxcache.runtime import audit


@pytest.fixture
def model():
    return seeded(Small)


class Against(SequentialDiT):
    """The blocks' residual moves against the stream, and by more: reuse follows the wrong way."""

    def stack(self, h):
        h = self.blocks[0](h)
        for _ in range(5):
            h = h - 20 * torch.tanh(h / 10) + 0.01 * self.blocks[1].mlp(h)
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


class Still(SequentialDiT):
    """Each block takes its input away again: nothing of the stream is left."""

    def stack(self, h):
        for block in self.blocks:
            h = (h + torch.tanh(block.mlp(h))) + (-h)
        return h


def test_a_hit_that_stands_still_is_not_used(caplog):
    denoiser = plain(seeded(Still))
    solve(denoiser, 4)
    assert hits(denoiser) == [False] * 4
    assert [r.reason for r in denoiser.report().records[1:]] == ["audit"] * 3
    assert any("did not move at all" in r.message for r in caplog.records)


def test_it_can_be_left_out():
    denoiser = plain(seeded(Against), audit=False)
    solve(denoiser, 4)
    assert denoiser.report().audit is None
    assert hits(denoiser) == [False, True, True, True]


def test_a_policy_that_never_hits_is_not_tried(model):
    denoiser = plain(model, NEVER)
    solve(denoiser, 3)
    assert denoiser.report().audit is None


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


def test_what_is_not_finite_cannot_be_judged_and_is_tried_again(model):
    denoiser = plain(model)
    denoiser(sample() * torch.nan, times(1.0))
    assert denoiser.report().audit is None
    denoiser(sample(), times(0.9))
    assert 0 < denoiser.report().audit < 1


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_constant_sample_is_moved_too(model, scale):
    denoiser = plain(model)
    denoiser(torch.full((2, 8, 4), scale), times(1.0))
    assert 0 < denoiser.report().audit < 1


def test_explain_shows_it(model):
    found = fxcache.explain(model, sample(), times(1.0), policy=ALWAYS)
    assert 0 < found.audit < 1
    assert "below 1 it follows" in str(found)
