"""What every policy promises besides the guarantees: branches, steps, complaints, other ways to
run. What holds for every model and policy is in tests/test_guarantees.py.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from comparing import assert_close, assert_identical
from helpers import adopt, hits, plain, sample, seeded, times
from opened import Small
from policies import ALTERNATE, EASY, FIRST, MAG, MEASURING, NEVER, SEA, TEA, name_of
from policy_cases import moving

import fxcache
from fxcache import MagCache, StackNotFoundError, StepSchedule
from fxcache.policy.base import Origin
from fxcache.policy.verdict import verdict
from fxcache.report import Record


def run(denoiser, steps=8, seed=0):
    """A trajectory."""
    with denoiser.trajectory(num_steps=steps):
        x = sample(seed=seed)
        return [denoiser(moving(x, i), times(1 - i / steps)) for i in range(steps)]


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_what_was_evaluated_unannounced_says_nothing(model, policy):
    denoiser = plain(model, policy)
    fresh, made = run(denoiser), hits(denoiser)
    for _ in range(4):
        denoiser(moving(sample(), 0), times(1))
    assert_identical(run(denoiser), fresh)
    assert hits(denoiser)[-8:] == made


def test_an_output_of_another_shape():
    """Only policies whose span is the whole model need one like the input."""

    class Narrow(Small):
        def forward(self, x, t):
            return super().forward(x, t).mean(-1)

    model, (x, t) = seeded(Narrow), (sample(), times(1))
    with pytest.raises(StackNotFoundError, match="they must have one shape"):
        plain(model, EASY)(x, t)
    denoiser = plain(model, NEVER)
    assert_identical([denoiser(x, t), denoiser(x, t)], [model(x, t)] * 2)
    adopt(denoiser, ALTERNATE)
    assert_close([denoiser(x, t), denoiser(x, t)], [model(x, t)] * 2)
    assert hits(denoiser) == [False, True]


def pair(denoiser, policy, steps=8, second=lambda i, x: x):
    """The records of two branches by step; `second` gives the uncond sample of a step, or None
    where it is not called.
    """
    adopt(denoiser, policy)
    with denoiser.trajectory(num_steps=steps):
        for i in range(steps):
            x, t = moving(sample(), i), times(1 - i / steps)
            with denoiser.branch("cond"):
                denoiser(x, t)
            other = second(i, x)
            if other is not None:
                with denoiser.branch("uncond"):
                    denoiser(other, t)
    records = denoiser.report().records
    return [{r.step: r for r in records if r.branch == name} for name in ("cond", "uncond")]


@pytest.mark.parametrize("policy", [*MEASURING, MAG], ids=name_of)
def test_branches(model, policy):
    """Whether the first decides for both, within a guidance interval, and with NaN."""
    denoiser, loose = plain(model, policy), replace(policy, threshold=9.0)
    by_first, by_each = replace(policy, decide="first"), replace(policy, decide="each")

    def wild(i, x):
        return x + 10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))

    if policy in MEASURING:
        cond, uncond = pair(denoiser, by_first, second=wild)
        assert [r.is_hit for r in cond.values()] == [r.is_hit for r in uncond.values()]
        assert any(r.is_hit for r in uncond.values())
        reasons = {r.reason for r in uncond.values() if not r.is_hit}
        assert reasons <= {"nothing cached", "the first branch computed"}
        own, other = pair(denoiser, by_each, second=wild)
        assert [r.is_hit for r in own.values()] == [r.is_hit for r in cond.values()]
        assert not any(r.is_hit for r in other.values())

        with_nan = pair(denoiser, replace(loose, decide="first"),
                        second=lambda i, x: x * math.nan if i == 4 else x)  # fmt: skip
        assert with_nan[0][4].is_hit or policy == SEA
        assert not with_nan[1][4].is_hit

    for decide in ("first", "each"):
        within = replace(loose, decide=decide)
        cond, uncond = pair(denoiser, within, 12, lambda i, x: x if 4 <= i < 9 else None)
        assert list(cond) == list(range(12))
        assert list(uncond) == list(range(4, 9))
        assert (uncond[4].is_hit, uncond[4].reason) == (False, "nothing cached")
        assert cond[4].is_hit or policy.max_consecutive_hits == 2
        if decide == "first":
            assert all(cond[i].is_hit == uncond[i].is_hit for i in range(5, 9))


@pytest.mark.parametrize("policy", [replace(MAG, threshold=0.2), replace(EASY, final_steps=2), TEA,
                                    replace(SEA, warmup_steps=3)], ids=name_of)  # fmt: skip
def test_heun_counts_timesteps(model, policy):
    """Two evaluations a step; the second belongs to the next step's timestep. Announced or not."""
    denoiser = plain(model, policy)

    def solve():
        for i in range(11):
            x, t = moving(sample(), i), times(1 - i / 12)
            denoiser(x, t)
            denoiser(x + 0.1, times(1 - (i + 1) / 12))
        return denoiser.report().records

    def check(records, policy):
        assert [r.step for r in records] == [0, *sorted([*range(1, 11)] * 2), 11]
        assert {r.trajectory for r in records} == {records[0].trajectory}
        assert any(r.is_hit for r in records)
        if policy.probe is not None:
            return
        for at, record in enumerate(records):  # the table's index is the step
            misses = [r.step for r in records[:at] if not r.is_hit]
            if record.is_hit:
                ratio, error = 1.0, 0.0
                for gamma in policy.ratios[misses[-1] + 1 : record.step + 1]:
                    ratio *= gamma
                    error += abs(1 - ratio)
                assert error < policy.threshold

    with denoiser.trajectory(num_steps=12):
        records = solve()
    check(records, policy)
    if policy.probe is not None and policy.final_steps:
        assert [r.reason for r in records[-3:]] == ["final step"] * 3
    unannounced = replace(policy, **({} if policy.probe is None else {"final_steps": 0}))
    adopt(denoiser, unannounced)
    check(solve(), unannounced)


def test_a_second_expert_counts_from_the_trajectorys_start(model):
    ratios = [1.0] * 26 + [1.0, 1.02, 1.05, 1.2, 1.0, 1.0, 1.3] + [1.0] * 7
    policies = [MagCache(ratios=ratios, threshold=0.06, max_consecutive_hits=9),
                replace(EASY, threshold=9.0, warmup_steps=30, final_steps=2),
                replace(TEA, threshold=9.0, final_steps=3, start=0.7)]  # fmt: skip
    expected = [{27, 30, 31, *range(33, 40)}, {*range(30, 38)}, {*range(28, 37)}]
    for policy, steps in zip(policies, expected, strict=True):
        denoiser = plain(model, policy)
        for _ in range(2):
            denoiser.reset()
            with denoiser.trajectory(num_steps=40, first_step=26):
                for i in range(26, 40):
                    denoiser(moving(sample(), i), times(1 - i / 40))
            records = denoiser.report().records
            assert [r.step for r in records] == list(range(26, 40))
            assert {r.step for r in records if r.is_hit} == steps


def complaints(caplog):
    return [r.message for r in caplog.records if "would have hit" in r.message
            or "never hit" in r.message]  # fmt: skip


TOLD = [replace(EASY, final_steps=1), replace(TEA, final_steps=1), replace(SEA, final_steps=1),
        FIRST, MAG]  # fmt: skip


@pytest.mark.parametrize("policy", TOLD, ids=name_of)
def test_a_policy_that_never_hits_or_always_is_told_once(model, caplog, policy):
    """And neither one that does both, nor one that was asked for it."""
    denoiser = plain(model, policy)
    for silent, steps in ((policy, 12), (replace(policy, threshold=math.inf), 3),
                          (replace(policy, threshold=0.0), 3)):  # fmt: skip
        run(adopt(denoiser, silent), steps)
        denoiser.report()
        assert not complaints(caplog), silent

    if policy.max_consecutive_hits is not None:
        policy = replace(policy, max_consecutive_hits=99)
    for threshold in (1e-5, 1e5):
        adopt(denoiser, replace(policy, threshold=threshold))
        for seed in range(3):
            run(denoiser, 12, seed)
        denoiser.report()
        (message,) = complaints(caplog)
        assert ("never hit" if threshold < 1 else "hit on every step") in message
        assert f"{type(policy).__name__}(threshold={threshold:g})" in message
        low, high = re.search(r"the metric was (\S+) to (\S+)\.", message).groups()
        assert 0 <= float(low) <= float(high) < 10
        advised = float(re.search(r"A threshold of about (\S+) would", message)[1])
        caplog.clear()
        run(adopt(denoiser, replace(policy, threshold=advised)), 12)
        # The metrics of First Block Cache depend on what was hit.
        low, high = (2, 10) if policy.probe == FIRST.probe else (5, 7)
        assert low <= sum(hits(denoiser)) <= high
        denoiser.report()
        assert not complaints(caplog)


def test_schedules_and_reports_amid_a_trajectory_are_nothing_to_complain_about(model, caplog):
    """A schedule hits where it says so: always or never. Another hits later on: at first each
    sample is another.
    """
    for is_hit, reason in ((True, None), (False, "scheduled")):
        records = [Record(i, None, 1.0, None, is_hit, reason) for i in range(9)]
        assert verdict(StepSchedule(mask=[is_hit] * 9), {None: records}, 9) is None
    denoiser = plain(model, FIRST)
    with denoiser.trajectory(num_steps=14):
        for i in range(14):
            denoiser(sample(seed=min(i, 6)), times(1 - i / 14))
            denoiser.report()
    assert any(hits(denoiser)[7:])
    assert not any(hits(denoiser)[:6])
    assert not complaints(caplog)


def test_a_preset_of_another_model_warns(model):
    origin = Origin(preset="flux-dev, teacache", model_classes=("FluxTransformer2DModel",))
    with pytest.warns(UserWarning, match="flux-dev.*FluxTransformer2DModel.*Small") as seen:
        plain(model, replace(TEA, origin=origin))
    assert len(seen) == 1
    for own in (Origin(preset="mine", model_classes=("Small", "Other")), Origin(preset="all's")):
        plain(model, replace(TEA, origin=own))


@pytest.mark.parametrize("policy", [EASY, TEA], ids=name_of)
def test_a_hit_has_the_dtype_of_a_miss(model, policy):
    denoiser = plain(model, replace(policy, threshold=9.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(denoiser)
    assert any(hits(denoiser))
    assert {out.dtype for out in outputs} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [EASY, SEA], ids=name_of)
def test_inductor(model, policy):
    a, b = fxcache.transform(model, policy), plain(model, policy)
    for seed in (0, 1):
        assert_close(run(a, 12, seed), run(b, 12, seed), 1e-4)
    assert hits(a) == hits(b)
    assert any(hits(a))
