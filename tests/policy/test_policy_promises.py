"""What every policy promises: exact misses, NaN, trajectories, branches, steps, complaints."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import (
    assert_close,
    assert_identical,
    graphed,
    hits,
    plain,
    sample,
    seeded,
    short,
    tensors,
    times,
)
from policy_cases import EASY, FIRST, MAG, MEASURING, SEA, TEA, Narrow, case, moving, name_of
from zoo import SequentialDiT, UViT

import fxcache
from fxcache import MagCache, StepSchedule
from fxcache.policy.base import Origin


def run(denoiser, steps=8, seed=0, broken=(), **shape):
    """A trajectory; the samples of the steps `broken` hold a NaN."""
    outputs = []
    with denoiser.trajectory(num_steps=steps):
        for i in range(steps):
            x = moving(sample(seed=seed, **shape), i)
            if i in broken:
                x[0, 0, 0] = math.nan
            outputs.append(denoiser(x, times(1 - i / steps, len(x))))
    return outputs


def last_hits(denoiser, steps=8):
    return hits(denoiser)[-steps:]


@pytest.mark.parametrize("policy", [*MEASURING, MAG], ids=name_of)
@pytest.mark.parametrize("name", [UViT, Narrow, "flux"])
def test_threshold_0_is_the_model(policy, name):
    if name is Narrow and policy.span.whole_model:
        pytest.skip("an output of another shape is refused there")
    model, at, _ = case(name)
    denoiser = plain(model, replace(policy, threshold=0.0))
    for step in range(5):
        given = at(step)
        before = [t.clone() for t in tensors(given)]
        assert_identical(denoiser(**given), model(**given))
        assert_identical(given, before)
    assert not any(hits(denoiser))


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_nan_is_a_miss_and_is_left_behind(model, policy):
    policy = replace(policy, threshold=9.0)
    denoiser = plain(model, policy)
    for broken in ((0,), (3,), (2, 5), (9,)):
        outputs = run(denoiser, 10, broken=broken)
        made = last_hits(denoiser, 10)
        assert not any(made[i] for i in broken)
        assert all(out.isfinite().all() for i, out in enumerate(outputs) if i not in broken)
        assert any(made)


@pytest.mark.parametrize("policy", [*MEASURING, MAG], ids=name_of)
def test_second_trajectories_are_as_good_as_first(model, policy):
    denoiser, fresh = plain(model, policy), plain(model, policy)
    for seed, steps, shape in ((0, 8, {}), (1, 8, {}), (0, 6, {"batch": 3}), (0, 11, {"tokens": 5}),
                               (0, 8, {})):  # fmt: skip
        fresh.reset()
        assert_identical(run(denoiser, steps, seed, **shape), run(fresh, steps, seed, **shape))
        assert last_hits(denoiser, steps) == hits(fresh)
    assert any(hits(denoiser))


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
@pytest.mark.parametrize("before", ["nan", "same"])
def test_what_a_trajectory_left_says_nothing(model, policy, before):
    """Also if the last one ended with NaN, or where the next begins."""
    denoiser, fresh = plain(model, policy), plain(model, policy)
    if before == "nan":
        run(denoiser, broken=(7,))
    else:
        for _ in range(4):
            denoiser(moving(sample(), 0), times(1))
    run(denoiser), run(fresh)
    assert last_hits(denoiser) == hits(fresh)


# --- branches ---


def pair(denoiser, steps=8, second=None, name="uncond", names=("cond", "uncond")):
    """Two branches; `second` gives the uncond sample of a step, or None where it is not called."""
    with denoiser.trajectory(num_steps=steps):
        for i in range(steps):
            x, t = moving(sample(), i), times(1 - i / steps)
            with denoiser.branch(names[0]):
                denoiser(x, t)
            other = x if second is None else second(i, x)
            if other is not None:
                with denoiser.branch(names[1]):
                    denoiser(other, t)
    records = denoiser.report().records
    return [{r.step: r for r in records if r.branch == name} for name in names]


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_the_first_branch_decides(model, policy):
    def wild(i, x):
        return x + 10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))

    cond, uncond = pair(plain(model, replace(policy, decide="first")), second=wild)
    assert [r.is_hit for r in cond.values()] == [r.is_hit for r in uncond.values()]
    assert any(r.is_hit for r in uncond.values())
    reasons = {r.reason for r in uncond.values() if not r.is_hit}
    assert reasons <= {"nothing cached", "the first branch computed"}
    own, other = pair(plain(model, replace(policy, decide="each")), second=wild)
    assert [r.is_hit for r in own.values()] == [r.is_hit for r in cond.values()]
    assert not any(r.is_hit for r in other.values())


@pytest.mark.parametrize("policy", [EASY, TEA, MAG], ids=name_of)
@pytest.mark.parametrize("decide", ["first", "each"])
def test_a_branch_within_a_guidance_interval(model, policy, decide):
    policy = replace(policy, threshold=9.0, decide=decide)
    cond, uncond = pair(plain(model, policy), 12, lambda i, x: x if 4 <= i < 9 else None)
    assert list(cond) == list(range(12))
    assert list(uncond) == list(range(4, 9))
    assert (uncond[4].is_hit, uncond[4].reason) == (False, "nothing cached")
    assert cond[4].is_hit or policy.max_consecutive_hits == 2
    if decide == "first":
        assert all(cond[i].is_hit == uncond[i].is_hit for i in range(5, 9))


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_nan_is_a_miss_of_a_branch_that_is_led(model, policy):
    policy = replace(policy, threshold=9.0, decide="first")
    cond, uncond = pair(plain(model, policy), second=lambda i, x: x * math.nan if i == 4 else x)
    assert cond[4].is_hit or policy == SEA
    assert not uncond[4].is_hit


def test_a_batched_call_decides_once(model):
    denoiser = plain(model, replace(EASY, threshold=9.0))
    run(denoiser, batch=4)
    assert len(hits(denoiser)) == 8
    assert any(hits(denoiser))


# --- steps ---


@pytest.mark.parametrize("policy", [replace(MAG, threshold=0.2), replace(EASY, final_steps=2), TEA,
                                    replace(SEA, warmup_steps=3)], ids=name_of)  # fmt: skip
@pytest.mark.parametrize("announced", [True, False])
def test_heun_counts_timesteps(model, policy, announced):
    """Two evaluations a step; the second belongs to the next step's timestep."""
    if not announced:
        policy = replace(policy, **({} if policy.probe is None else {"final_steps": 0}))
    denoiser = plain(model, policy)

    def solve():
        for i in range(11):
            x, t = moving(sample(), i), times(1 - i / 12)
            denoiser(x, t)
            denoiser(x + 0.1, times(1 - (i + 1) / 12))

    if announced:
        with denoiser.trajectory(num_steps=12):
            solve()
    else:
        solve()
    records = denoiser.report().records
    assert [r.step for r in records] == [0, *sorted([*range(1, 11)] * 2), 11]
    assert {r.trajectory for r in records} == {records[0].trajectory}
    assert any(r.is_hit for r in records)
    if policy.probe is None:  # the table's index is the step
        for at, record in enumerate(records):
            misses = [r.step for r in records[:at] if not r.is_hit]
            if record.is_hit:
                ratio, error = 1.0, 0.0
                for gamma in policy.ratios[misses[-1] + 1 : record.step + 1]:
                    ratio *= gamma
                    error += abs(1 - ratio)
                assert error < policy.threshold
    elif policy.final_steps:
        assert [r.reason for r in records[-3:]] == ["final step"] * 3


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


# --- complaints ---


def complaints(caplog):
    return [r.message for r in caplog.records if "would have hit" in r.message
            or "never hit" in r.message]  # fmt: skip


TOLD = [replace(EASY, final_steps=1), replace(TEA, final_steps=1), replace(SEA, final_steps=1),
        FIRST, MAG]  # fmt: skip


@pytest.mark.parametrize("policy", TOLD, ids=name_of)
@pytest.mark.parametrize("threshold", [1e-5, 1e5])
def test_a_policy_that_never_hits_or_always_is_told_once(model, caplog, policy, threshold):
    if policy.max_consecutive_hits is not None:
        policy = replace(policy, max_consecutive_hits=99)
    denoiser = plain(model, replace(policy, threshold=threshold))
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
    sane = plain(model, replace(policy, threshold=advised))
    run(sane, 12)
    # The metrics of First Block Cache depend on what was hit.
    low, high = (2, 10) if policy.probe == FIRST.probe else (5, 7)
    assert low <= sum(hits(sane)) <= high
    sane.report()
    assert not complaints(caplog)


def test_what_is_nothing_to_complain_about(model, caplog):
    silent = [(StepSchedule(mask=[False] * 9), 9), (StepSchedule(mask=[True] * 9), 9),
              (replace(FIRST, threshold=math.inf), 3), (replace(EASY, threshold=0.0), 3),
              (FIRST, 12), (EASY, 12), (TEA, 12), (SEA, 12), (MAG, 12)]  # fmt: skip
    for policy, steps in silent:
        denoiser = plain(model, policy)
        run(denoiser, steps)
        denoiser.report()
        assert not complaints(caplog), policy


def test_a_report_amid_a_trajectory_is_no_verdict(model, caplog):
    """It hits later on: at first each sample is another."""
    denoiser = plain(model, FIRST)
    with denoiser.trajectory(num_steps=14):
        for i in range(14):
            denoiser(sample(seed=min(i, 6)), times(1 - i / 14))
            denoiser.report()
    assert any(hits(denoiser)[7:])
    assert not any(hits(denoiser)[:6])
    assert not complaints(caplog)


def test_a_preset_of_another_model_warns():
    origin = Origin(preset="flux-dev, teacache", model_classes=("FluxTransformer2DModel",))
    with pytest.warns(UserWarning, match="flux-dev.*FluxTransformer2DModel.*SequentialDiT") as seen:
        plain(seeded(SequentialDiT), replace(TEA, origin=origin))
    assert len(seen) == 1
    own = Origin(preset="mine", model_classes=("SequentialDiT", "Other"))
    plain(seeded(SequentialDiT), replace(TEA, origin=own))
    plain(seeded(SequentialDiT), replace(TEA, origin=Origin(preset="anybody's")))


# --- compilers, graphs, shortcuts ---


@pytest.mark.parametrize("policy", [EASY, TEA, SEA], ids=name_of)
def test_graphs(model, device, policy):
    """From the second trajectory on: the device runs a piece twice when it captures it."""
    a, b = graphed(model, policy), plain(model, policy)
    run(a, 12), run(b, 12)
    captured = device.captures
    for seed in (0, 1, 2):
        assert_close(run(a, 12, seed), run(b, 12, seed))
        assert last_hits(a, 12) == last_hits(b, 12)
        assert any(last_hits(a, 12))
    assert 0 < captured == device.captures


@pytest.mark.parametrize("policy", [EASY, TEA, SEA, MAG], ids=name_of)
def test_guards_once_a_trajectory(model, policy):
    a, b = short(model, policy), plain(model, policy)
    for seed in (0, 1):
        assert_identical(run(a, 12, seed), run(b, 12, seed))
    assert a.report().records == b.report().records
    assert any(hits(a))


@pytest.mark.parametrize("policy", [EASY, TEA, SEA], ids=name_of)
def test_guards_once_a_trajectory_and_two_evaluations_a_timestep(model, policy):
    """An evaluation that is begun anew measures what it would have."""
    denoisers = [short(model, policy), plain(model, policy)]
    for denoiser in denoisers:
        for i in range(6):
            for shift in (0.0, 0.1):
                denoiser(moving(sample(), i) + shift, times(1 - i / 6))
    records = [denoiser.report().records for denoiser in denoisers]
    assert [r.metric for r in records[0]] == [r.metric for r in records[1]]


@pytest.mark.parametrize("policy", [EASY, SEA, TEA], ids=name_of)
def test_a_hit_has_the_dtype_of_a_miss(model, policy):
    denoiser = plain(model, replace(policy, threshold=9.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(denoiser)
    assert any(hits(denoiser))
    assert {out.dtype for out in outputs} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [EASY, SEA], ids=name_of)
def test_inductor(policy):
    torch.manual_seed(0)
    model = SequentialDiT(depth=2).eval()
    a, b = fxcache.transform(model, policy), plain(model, policy)
    for seed in (0, 1):
        assert_close(run(a, 12, seed), run(b, 12, seed), 1e-4)
    assert hits(a) == hits(b)
    assert any(hits(a))
