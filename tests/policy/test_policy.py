"""The rules and parameters of the policies, without a model; schedules over models."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from comparing import assert_close, assert_identical, count_products
from helpers import adopt, hits, plain, sample, seeded, times
from opened import Small
from policies import EASY, MEASURING, POLY, TEA, name_of
from zoo import at_step, make

import fxcache
from fxcache import (
    AdaptiveCache,
    EasyCache,
    FirstBlockCache,
    MagCache,
    PolicyError,
    Reuse,
    SeaCache,
    StepSchedule,
    Taylor,
    TeaCache,
)
from fxcache.policy import History, Span
from fxcache.policy.simulate import simulate


def made(policy, metrics, **options):
    return [decision.is_hit for decision in simulate(policy, metrics, **options)]


def reasons(policy, metrics, **options):
    return [decision.reason for decision in simulate(policy, metrics, **options)]


def test_the_rule_of_first_block_cache():
    """The published defaults; the first is a miss, 0 never hits, infinity whenever it may."""
    policy = FirstBlockCache()
    assert policy.threshold == 0.08
    assert (policy.head_blocks, policy.tail_blocks) == (1, 0)
    assert (policy.start, policy.end, policy.warmup_steps) == (0.0, 1.0, 0)
    assert (policy.max_consecutive_hits, policy.max_accumulated) == (None, None)
    assert policy.forecast == Reuse()

    def found(metrics, num_steps=None, **limits):
        policy, history = FirstBlockCache(**{"threshold": math.inf, **limits}), History()
        history.num_steps, hit = num_steps, []
        for history.step, metric in enumerate(metrics):  # as they are measured, not added up
            decision = policy.rule(metric, history)
            hit.append(decision.is_hit)
            history.past = history.past if hit[-1] else (history.step,)
            history.accumulated = hit[-1] * (history.accumulated + decision.score)
            history.hits_in_a_row = hit[-1] * (history.hits_in_a_row + 1)
        return hit

    assert found([0.0] * 3) == [False, True, True]
    assert found([1e30] * 4)[1:] == [True] * 3
    assert not any(found([0.0] * 4, threshold=0.0))
    assert found([0.0] * 8, warmup_steps=5) == [False] * 5 + [True] * 3
    limited = [False, True, True, False, True, True, False]
    assert found([0.0] * 7, max_consecutive_hits=2) == limited
    assert not any(found([0.0] * 4, threshold=9.0, max_consecutive_hits=0))
    assert found([0.1] * 6, threshold=1.0, max_accumulated=0.25) == limited[:6]
    window = [False] * 3 + [True] * 4 + [False] * 3
    assert found([0.0] * 10, 10, start=0.3, end=0.7) == window
    with pytest.raises(PolicyError, match=r"trajectory\(num_steps"):
        found([0.0] * 10, start=0.3, end=0.7)
    for broken in (math.nan, math.inf):
        decision = FirstBlockCache(threshold=math.inf).rule(broken, History(step=1, past=(0,)))
        assert (decision.is_hit, decision.reason) == (False, "not finite")
    with pytest.raises(PolicyError, match="start must be below end"):
        FirstBlockCache(start=0.5, end=0.5)
    with pytest.raises(TypeError):
        FirstBlockCache(0.1)
    with pytest.raises(AttributeError):
        FirstBlockCache().threshold = 0.5


def test_easy_cache_sums_since_the_last_computed_step():
    metrics = [9.0, 9.0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.4, 0.1]
    pattern = [False, False, True, True, False, True, False, False, True]
    assert made(EASY, metrics) == pattern
    assert reasons(EASY, metrics)[:2] == ["nothing cached", "no rate yet"]
    policy = replace(EASY, warmup_steps=3, final_steps=1)
    assert reasons(policy, metrics, num_steps=9) == [
        "nothing cached", "warm-up", "warm-up", None, None, "above threshold", None,
        "above threshold", "final step"]  # fmt: skip


def test_tea_cache_sums_the_polynomial():
    policy = TeaCache(coefficients=[0, 0, 0, -2.0, 0.05], threshold=0.55, final_steps=0)
    assert policy.score(0.1) == pytest.approx(0.15)
    assert TEA.score(0.3) == pytest.approx(40 * 0.0081 - 7 * 0.027 + 3 * 0.09 + 0.45 + 0.01)
    metrics = [9.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1]
    pattern = [False, True, True, True, False, True, True, True, True]
    assert made(policy, metrics) == pattern
    assert simulate(policy, metrics)[5].score == pytest.approx(0.05)


def test_sea_cache_sums_and_counts():
    policy = SeaCache(threshold=1.0, final_steps=2)
    pattern = [False, True, True, False, True, False, True, True, False, False]
    metrics = [9.0, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.2, 0.0, 0.0]
    assert made(policy, metrics, num_steps=10) == pattern
    assert reasons(policy, metrics, num_steps=10)[3] == "max_consecutive_hits"


@pytest.mark.parametrize("policy", MEASURING, ids=name_of)
def test_limits_of_every_policy_that_measures(policy):
    broken = [0.0, 0.0, math.nan, 0.0, math.inf, 0.0, 0.0, 0.0]
    assert not any(made(policy, broken)[i] for i in (0, 2, 4))
    assert reasons(replace(policy, threshold=math.inf), broken)[2::2][:2] == ["not finite"] * 2
    assert not any(made(replace(policy, threshold=0.0), [0.0] * 8))
    window = replace(policy, threshold=9.0, start=0.25, end=0.75, max_consecutive_hits=None)
    assert [i for i, hit in enumerate(made(window, [0.01] * 8, num_steps=8)) if hit] == [2, 3, 4, 5]
    # In float32: a sum that rounds to the threshold is not below it.
    metric = 0.10000000149011612
    tie = replace(policy, threshold=0.1)
    if not isinstance(policy, TeaCache):
        assert not made(tie, [0.0, 0.0, metric])[2]


NAN, INF = math.nan, math.inf
BAD = {
    FirstBlockCache: {
        "threshold": [-0.1, NAN, "0.1", True], "head_blocks": [0, 1.5], "tail_blocks": [-1],
        "start": [-0.1], "end": [1.1], "warmup_steps": [-1], "max_consecutive_hits": [-1],
        "max_accumulated": [-1.0, NAN], "forecast": ["taylor"],
    },
    AdaptiveCache: {
        "tolerance": [-1, NAN], "order": [4, -1], "slope": [2], "max_consecutive_hits": [0],
        "warmup_steps": [-1], "final_steps": [-1], "decide": ["all"],
    },
    EasyCache: {
        "threshold": [-0.1, NAN, "0.1", None], "warmup_steps": [-1, 1.0], "final_steps": [-1, True],
        "decide": ["last", None, ["first"]], "start": [-0.1], "end": [1.5], "origin": ["flux"],
        "forecast": [None],
    },
    TeaCache: {
        "coefficients": [[1.0] * 4, [1.0] * 6, [0, 0, NAN, 0, 0], [0, 0, INF, 0, 0], "12345", None,
                         [0, 0, "x", 0, 0], torch.ones(5, 2), [10**400, 0, 0, 0, 0]],
        "signal": ["time", ["time_embedding"]], "threshold": [-1], "max_consecutive_hits": [-1],
    },
    SeaCache: {"power": [0, INF, NAN, -1.0], "threshold": [-1], "warmup_steps": [-1]},
    MagCache: {
        "threshold": [-0.1, NAN], "retention_ratio": [-0.1, 1.1, NAN], "decide": ["cond"],
        "max_consecutive_hits": [-1, None],
        "ratios": [[], [1.0], None, [1.0, -1.0], [1.0, NAN], [1.0, INF], {}, "123",
                   {"cond": [1.0, 1.0], "uncond": [1.0] * 3}, torch.ones(2, 2), [1, 10**400]],
    },
}  # fmt: skip


@pytest.mark.parametrize("policy", BAD, ids=name_of)
def test_bad_values_are_named(policy):
    needed = {TeaCache: {"coefficients": POLY}, MagCache: {"ratios": [1.0, 1.0]}}.get(policy, {})
    policy(**needed)
    for name, values in BAD[policy].items():
        for value in values:
            with pytest.raises(PolicyError, match=f"^{name}") as error:
                policy(**{**needed, name: value})
            said = str(error.value)
            assert any(word in said for word in ("must be", "must hold", "must have")), value
            assert isinstance(value, list | tuple | dict | torch.Tensor) or repr(value) in said


def test_masks_become_tuples_of_booleans():
    for mask in ([False, True], (0, 1), [0.0, 1.0], np.array([False, True]),
                 torch.tensor([False, True]), (i == 1 for i in range(2))):  # fmt: skip
        policy = StepSchedule(mask=mask)
        assert policy.mask == (False, True)
        assert all(type(value) is bool for value in policy.mask)
        assert policy == StepSchedule(mask=[False, True])
        assert isinstance(hash(policy), int)


def test_bad_schedules_are_named():
    for mask in ((), [], None, 3, True, "10", [2], [0.5], [None], ["True"], [True, "x"], [math.nan],
                 [[True, False]], np.zeros((2, 2), bool), torch.zeros(2, 2)):  # fmt: skip
        with pytest.raises(PolicyError, match="mask must hold one boolean a step"):
            StepSchedule(mask=mask)
    for share in (0, 0.09, 1.1, -1, math.nan, True, "1"):
        with pytest.raises(PolicyError, match=r"input_share must be a number in \[0.1, 1\], got"):
            StepSchedule(mask=[True], input_share=share)
    with pytest.raises(PolicyError, match="forecast"):
        StepSchedule(mask=[True], forecast="taylor")
    with pytest.raises(TypeError):
        StepSchedule([True])
    with pytest.raises(AttributeError):
        StepSchedule(mask=[True]).mask = [False]


def test_a_schedule_hits_where_the_mask_says_so():
    """It measures nothing and spans the stack."""
    policy = StepSchedule(mask=[True, True, False, True, True])
    assert made(policy, [math.nan] * 7) == [False, True, False, True, True, False, False]
    assert policy.rule(math.nan, History(step=2, past=(0,))).reason == "scheduled"
    assert policy.rule(math.nan, History(step=5, past=(0,))).reason == "beyond the mask"
    assert policy.rule(math.nan, History(step=1)).reason == "nothing cached"
    assert (policy.probe, policy.span) == (None, Span())
    assert isinstance(policy, fxcache.policy.Policy)


@pytest.mark.parametrize("name", ["sequential_dit", "uvit"])
def test_a_schedule_over_models(name):
    """A hit on the inputs of a miss gives its output; what is computed is the model's own."""
    model, inputs = make(name)
    denoiser = plain(model, StepSchedule(mask=[True]))
    missed, hit = denoiser(**inputs), denoiser(**inputs)
    assert hits(denoiser) == [False, True]
    assert_close(hit, missed, tolerance=1e-4)
    adopt(denoiser, StepSchedule(mask=[False, True, False]))
    with denoiser.trajectory():
        for step in range(4):  # each at another timestep
            given = at_step(name, inputs, step)
            out = denoiser(**given)
            if step != 1:
                assert_identical(out, model(**given))
    records = denoiser.report().records
    assert [record.metric for record in records] == [None] * 4
    reasons = [record.reason for record in records]
    assert reasons == ["nothing cached", None, "scheduled", "beyond the mask"]


@pytest.mark.parametrize("share", [1, 0.5, 0.1])
def test_a_hit_adds_its_share_of_the_input_to_what_is_forecast(share):
    model = seeded(Small)
    denoiser = plain(model, StepSchedule(mask=[False, False, True], forecast=Taylor(order=1)))
    denoiser.policy = replace(denoiser.policy, input_share=share)  # is captured anew
    given = [(sample(seed=step), times(1 - step / 3)) for step in range(3)]
    outputs = [denoiser(*each) for each in given]
    before = [model.embed(x) + model.time(t[:, None])[:, None] for x, t in given]
    first, last = (model.stack(each) - share * each for each in before[:2])
    expected = model.out(model.norm(share * before[2] + 2 * last - first))
    assert hits(denoiser) == [False, False, True]
    assert_close(outputs[2], expected, tolerance=1e-5)
    assert_identical(outputs[1], model(*given[1]))


def test_a_scheduled_hit_runs_no_block():
    model, policy = seeded(Small), StepSchedule(mask=[True])
    explanation = fxcache.explain(model, sample(), times(1), policy=policy)
    assert explanation.span_blocks == ("blocks.0", "blocks.1")
    assert (explanation.head_blocks, explanation.tail_blocks, explanation.probe) == ((), (), None)
    denoiser = plain(model, policy)
    denoiser(sample(), times(1))
    assert count_products(lambda: denoiser(sample(), times(1))) == 3  # embed, time, out
