"""The decisions and parameters of the policies, the forecasters, and the defaults."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_identical, count_products, hits, sample, times
from zoo import SequentialDiT, at_step, make

import fxcache
from fxcache import FirstBlockCache, PolicyError, Reuse, StepSchedule, Taylor
from fxcache.policy import History, Span

PAST = (0,)


def decisions(policy, metrics, num_steps=None):
    """The hits that `policy` makes of a trajectory's `metrics` (one a step)."""
    history = History(num_steps=num_steps)
    made = []
    for step, metric in enumerate(metrics):
        history.step = step
        decision = policy.rule(metric, history)
        made.append(decision.is_hit)
        if decision.is_hit:
            history.accumulated += decision.score
            history.hits_in_a_row += 1
        else:
            history.accumulated, history.hits_in_a_row, history.past = 0.0, 0, (step,)
    return made


def test_defaults_are_the_published_ones():
    policy = FirstBlockCache()
    assert policy.threshold == 0.08
    assert (policy.head_blocks, policy.tail_blocks) == (1, 0)
    assert (policy.start, policy.end, policy.warmup_steps) == (0.0, 1.0, 0)
    assert policy.max_consecutive_hits is None
    assert policy.max_accumulated is None
    assert policy.forecast == Reuse()


def test_the_first_evaluation_is_always_a_miss():
    assert decisions(FirstBlockCache(threshold=math.inf), [0.0] * 3) == [False, True, True]


def test_zero_never_hits_and_infinity_hits_whenever_it_may():
    assert not any(decisions(FirstBlockCache(threshold=0.0), [0.0] * 4))
    assert decisions(FirstBlockCache(threshold=math.inf), [1e30] * 4)[1:] == [True] * 3


@pytest.mark.parametrize("metric", [math.nan, math.inf])
def test_nan_and_inf_are_misses(metric):
    decision = FirstBlockCache(threshold=math.inf).rule(metric, History(step=1, past=PAST))
    assert not decision.is_hit
    assert decision.reason == "not finite"


def test_the_threshold_is_compared_in_float32():
    # float32(0.1) is a little more than 0.1: a metric of that value is not below the threshold.
    metric = 0.10000000149011612
    assert not FirstBlockCache(threshold=0.1).rule(metric, History(step=1, past=PAST)).is_hit


def test_warmup_steps():
    made = decisions(FirstBlockCache(threshold=math.inf, warmup_steps=5), [0.0] * 8)
    assert made == [False] * 5 + [True] * 3


def test_max_consecutive_hits():
    made = decisions(FirstBlockCache(threshold=math.inf, max_consecutive_hits=2), [0.0] * 7)
    assert made == [False, True, True, False, True, True, False]
    assert not any(decisions(FirstBlockCache(threshold=9.0, max_consecutive_hits=0), [0.0] * 4))


def test_max_accumulated():
    made = decisions(FirstBlockCache(threshold=1.0, max_accumulated=0.25), [0.1] * 6)
    assert made == [False, True, True, False, True, True]


def test_start_and_end_are_fractions_of_the_steps():
    policy = FirstBlockCache(threshold=math.inf, start=0.3, end=0.7)
    assert decisions(policy, [0.0] * 10, num_steps=10) == [False] * 3 + [True] * 4 + [False] * 3
    with pytest.raises(PolicyError, match=r"trajectory\(num_steps"):
        policy.rule(0.0, History(step=1, past=PAST))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("threshold", "0.1"),
        ("threshold", True),
        ("head_blocks", 0),
        ("head_blocks", 1.5),
        ("tail_blocks", -1),
        ("start", -0.1),
        ("end", 1.1),
        ("warmup_steps", -1),
        ("max_consecutive_hits", -1),
        ("max_accumulated", -1.0),
        ("max_accumulated", math.nan),
        ("forecast", "taylor"),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(PolicyError, match=name) as error:
        FirstBlockCache(**{name: value})
    assert repr(value) in str(error.value)


def test_start_must_be_below_end():
    with pytest.raises(PolicyError, match="start must be below end"):
        FirstBlockCache(start=0.5, end=0.5)


def test_policies_are_frozen_and_keyword_only():
    with pytest.raises(TypeError):
        FirstBlockCache(0.1)
    with pytest.raises(AttributeError):
        FirstBlockCache().threshold = 0.5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_exact_for_polynomials_of_its_order(order):
    past = [9, 6, 4, 1][: order + 1]  # uneven steps, newest first

    def polynomial(step):
        return sum((k + 1) * step**k for k in range(order + 1))

    weights = Taylor(order=order).weights(12, past)
    forecast = sum(w * polynomial(s) for w, s in zip(weights, past, strict=True))
    assert forecast == pytest.approx(polynomial(12))
    assert Taylor(order=order).ring == order + 1


def test_taylor_falls_back_while_little_is_known():
    assert Taylor(order=2).weights(3, [2]) == [1.0]
    assert Taylor(order=2).weights(4, [3, 2]) == [2.0, -1.0]
    assert Taylor(order=1).weights(4, [3, 3]) == [1.0, 0.0]  # two evaluations of one step


@pytest.mark.parametrize("order", [0, 5, 1.0, None])
def test_taylor_orders(order):
    with pytest.raises(PolicyError, match=r"Taylor\.order"):
        Taylor(order=order)


# --- StepSchedule ---


@pytest.mark.parametrize(
    "mask",
    [(), [], None, 3, True, "10", [2], [0.5], [None], ["True"], [True, "x"], [[True, False]],
     np.zeros((2, 2), bool), torch.zeros(2, 2), [math.nan]],
)  # fmt: skip
def test_bad_masks_are_named(mask):
    with pytest.raises(PolicyError, match="mask must hold one boolean a step"):
        StepSchedule(mask=mask)


@pytest.mark.parametrize(
    "mask",
    [[False, True], (0, 1), [0.0, 1.0], np.array([False, True]), torch.tensor([False, True]),
     (i == 1 for i in range(2))],
)  # fmt: skip
def test_masks_become_tuples_of_booleans(mask):
    policy = StepSchedule(mask=mask)
    assert policy.mask == (False, True)
    assert all(type(value) is bool for value in policy.mask)
    assert policy == StepSchedule(mask=[False, True])
    assert isinstance(hash(policy), int)


def test_schedules_check_the_forecast():
    with pytest.raises(PolicyError, match="forecast"):
        StepSchedule(mask=[True], forecast="taylor")
    with pytest.raises(TypeError):
        StepSchedule([True])
    with pytest.raises(AttributeError):
        StepSchedule(mask=[True]).mask = [False]


def test_a_schedule_measures_nothing_and_spans_the_stack():
    policy = StepSchedule(mask=[True])
    assert (policy.probe, policy.span) == (None, Span())
    assert isinstance(policy, fxcache.policy.Policy)


def test_a_schedule_hits_where_the_mask_says_so():
    policy = StepSchedule(mask=[True, True, False, True, True])
    assert decisions(policy, [math.nan] * 7) == [False, True, False, True, True, False, False]
    assert policy.rule(math.nan, History(step=2, past=PAST)).reason == "scheduled"
    assert policy.rule(math.nan, History(step=5, past=PAST)).reason == "beyond the mask"
    assert policy.rule(math.nan, History(step=1)).reason == "nothing cached"


ZOO = ["sequential_dit", "uvit", "flux", "sd3", "sd15_unet", "wan_t2v", "pixart", "cogvideox"]


@pytest.mark.parametrize("name", ZOO)
def test_a_schedule_over_models(name):
    """Bit for bit the model without hits; a hit on the inputs of a miss gives its output."""
    model, inputs = make(name)
    never = fxcache.transform(model, StepSchedule(mask=[False] * 2), backend="eager")
    forced = fxcache.transform(model, StepSchedule(mask=[False, True, False]), backend="eager")
    for step in range(3):
        given = at_step(name, inputs, step)
        assert_identical(never(**given), model(**given))
    records = never.report().records
    assert [record.metric for record in records] == [None] * 3
    assert [record.reason for record in records] == [
        "nothing cached",
        "scheduled",
        "beyond the mask",
    ]
    with forced.trajectory():
        for step in (0, 1, 2):  # every evaluation of an announced trajectory at another timestep
            given = at_step(name, inputs, step)
            out = forced(**given)
            if step != 1:
                assert_identical(out, model(**given))
    assert hits(forced) == [False, True, False]


@pytest.mark.parametrize("name", ZOO)
def test_a_scheduled_hit_adds_the_residual(name):
    model, inputs = make(name)
    denoiser = fxcache.transform(model, StepSchedule(mask=[True]), backend="eager")
    missed, hit = denoiser(**inputs), denoiser(**inputs)
    assert hits(denoiser) == [False, True]
    assert_close(hit, missed, tolerance=1e-4)


def test_a_scheduled_hit_runs_no_block():
    torch.manual_seed(0)
    model, policy = SequentialDiT().eval(), StepSchedule(mask=[True])
    explanation = fxcache.explain(model, sample(), times(1), policy=policy)
    assert explanation.span_blocks == tuple(f"blocks.{i}" for i in range(4))
    assert (explanation.head_blocks, explanation.tail_blocks, explanation.probe) == ((), (), None)
    denoiser = fxcache.transform(model, policy, backend="eager")
    denoiser(sample(), times(1))
    assert count_products(lambda: denoiser(sample(), times(1))) == 3  # embed, time, out


@pytest.mark.parametrize("announced", [False, True])
def test_schedules_count_steps_by_timestep(announced):
    """Heun calls twice a step, and its second call belongs to the next step's timestep."""
    torch.manual_seed(0)
    policy = StepSchedule(mask=[False, False, True, False, True])
    denoiser = fxcache.transform(SequentialDiT().eval(), policy, backend="eager")

    def heun():
        for t in (1.0, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.6):
            denoiser(sample(), times(t))

    if announced:
        with denoiser.trajectory():
            heun()
    else:
        heun()
    records = denoiser.report().records
    assert [record.step for record in records] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert hits(denoiser) == [False, False, False, True, True, False, False, True]
    assert {record.metric for record in records} == {None}
