"""Conditioning that changes along a trajectory, and `control_threshold`."""

import math
import re
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from controlled import Controlled, control, looking, run
from helpers import (
    ALTERNATE,
    ALWAYS,
    adopt,
    assert_identical,
    graphed,
    hits,
    plain,
    sample,
    seeded,
    short,
    times,
)
from policy_cases import EASY, MAG, SEA, TEA, name_of

import fxcache
from fxcache import FirstBlockCache, PolicyError, StepSchedule
from fxcache.policy import Decision, Forecast, Reuse, Span
from fxcache.policy.probe import HeadResidual

STEPS = 8


@pytest.fixture
def model():
    return seeded(Controlled)


# --- what a change does ---


def test_a_miss_exactly_where_one_input_changes(model):
    """Each is looked at, and misses use the current ones."""
    denoiser = plain(model, looking(ALWAYS))
    given = {"control": control(), "features": control(seed=4), "strength": torch.ones(1)}
    for i in range(8):
        if i >= 2 and i % 2 == 0:
            given[list(given)[i // 2 - 1]] *= 1.5
        output = denoiser(sample() + 0.01 * i, times(1 - i / 8), **given)
        if i % 2 == 0:
            assert_identical(output, model(sample() + 0.01 * i, times(1 - i / 8), **given))
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons == ["nothing cached", None, *["control changed", None] * 3]


def test_misses_use_the_current_residuals(model):
    """Also where nobody looks at them."""
    denoiser = plain(model, ALTERNATE)
    controls = [control(1 + i) for i in range(4)]
    outputs, reasons = run(denoiser, controls)
    assert reasons == ["nothing cached", None, "max_consecutive_hits", None]
    for i in (0, 2):
        assert_identical(outputs[i], model(sample() + 0.01 * i, times(1 - i / 4), controls[i]))


def test_the_change_is_a_residual_diff_to_the_last_computed_step(model):
    """It grows by 4 % of the first a step: 4, 8, then 12; then 4/1.12 = 3.6, 7.1, 10.7."""
    controls = [control(1 + 0.04 * i) for i in range(8)]
    denoiser = plain(model, looking(ALWAYS))
    _, reasons = run(denoiser, controls)
    assert [i for i, reason in enumerate(reasons) if reason] == [0, 3, 6]
    assert set(reasons[1:]) == {None, "control changed"}


def test_the_threshold_is_strict(model):
    """And 0 never hits."""
    denoiser = plain(model, looking(ALWAYS, 0.26))
    for limit, is_hit in ((0.26, True), (0.25, False)):
        adopt(denoiser, looking(ALWAYS, limit))
        run(denoiser, [control(), control(1.25)])
        assert hits(denoiser) == [False, is_hit]
    adopt(denoiser, looking(ALWAYS, 0))
    outputs, reasons = run(denoiser, [control()] * 4)
    assert reasons == ["nothing cached", *["control changed"] * 3]
    expected = [model(sample() + 0.01 * i, times(1 - i / 4), control()) for i in range(4)]
    assert_identical(outputs, expected)


def test_values_at_the_edges(model):
    """Under a limit of inf: only what has no measure is a change, and no trace of it is left."""
    policy = looking(StepSchedule(mask=[False, True, True, True]), math.inf)
    denoiser = plain(model, policy, audit=False)
    hit = {(1.0, 1.0), (0.0, 0.0), (1e6, 0.0)}
    miss = {(0.0, 1e-6), (1.0, math.nan), (math.nan, math.nan), (1.0, math.inf)}
    for values in hit | miss:
        filled = [torch.full((2, 8, 16), value) for value in values]
        outputs, reasons = run(denoiser, [*filled, *[control()] * 2])
        assert reasons[1] == (None if values in hit else "control changed"), values
        assert reasons[3] is None
        assert outputs[3].isfinite().all()


def test_a_vector_and_another_dtype(model):
    denoiser = plain(model.bfloat16(), looking(ALWAYS))
    for i, strength in enumerate((1.0, 1.0, 1.5, 1.5)):
        given = {"control": control().bfloat16(), "strength": torch.tensor([strength]).bfloat16()}
        denoiser(sample().bfloat16(), times(1 - i / 4).bfloat16(), **given)
    assert hits(denoiser) == [False, True, False, True]


# --- every policy, branch and compiler ---

POLICIES = [
    FirstBlockCache(threshold=9.0),
    replace(EASY, threshold=9.0),
    replace(TEA, threshold=9e9),
    replace(SEA, threshold=9.0, max_consecutive_hits=9),
    replace(MAG, threshold=9.0, max_consecutive_hits=9),
    StepSchedule(mask=[True] * STEPS),
]


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_every_policy(model, policy):
    """It hits at steps 5 and 6 if nothing changes, and where the control changes at 5 alone."""
    denoiser = plain(model, looking(policy))
    _, unchanged = run(denoiser, [control()] * STEPS)
    controls = [control(2.0 if i >= 6 else 1.0) for i in range(STEPS)]
    outputs, reasons = run(denoiser, controls)
    assert unchanged[5] is unchanged[6] is reasons[5] is None
    assert reasons[6] == "control changed"
    assert_identical(outputs[6], model(sample() + 0.06, times(1 - 6 / STEPS), control(2.0)))


def test_branches(model):
    """Whose control changes computes; a first branch that computes makes the second compute."""
    denoiser, names = plain(model, looking(ALWAYS)), ("cond", "uncond")
    for decide, (changed, other) in product(("each", "first"), (names, names[::-1])):
        adopt(denoiser, looking(FirstBlockCache(threshold=math.inf, decide=decide)))
        with denoiser.trajectory(num_steps=4):
            for i in range(4):
                for branch in ("cond", "uncond"):
                    with denoiser.branch(branch):
                        scale = 2.0 if i >= 2 and branch == changed else 1.0
                        denoiser(sample(), times(1 - i / 4), control(scale))
        reasons = {(r.step, r.branch): r.reason for r in denoiser.report().records}
        assert reasons[2, changed] == "control changed"
        is_led = decide == "first" and changed == "cond"
        assert reasons[2, other] == ("the first branch computed" if is_led else None)
        assert all(reasons[step, name] is None for step in (1, 3) for name in (changed, other))


def test_replayed_graphs(model, device):
    """The caller's inputs are looked at, not what the graphs read: the same decisions."""
    policy = looking(FirstBlockCache(threshold=math.inf))
    controls = [control(2.0 if i in (2, 3, 5) else 1.0) for i in range(STEPS)]
    denoiser = graphed(model, policy)
    expected, own = run(plain(model, policy), controls)
    for _ in range(3):
        outputs, reasons = run(denoiser, controls)
        assert reasons == own
        assert_identical(outputs, expected)
    assert reasons.count("control changed") == 4
    assert device.counts()[0] > 0


def test_the_way_past_the_guards(model):
    controls = [control(2.0 if i >= 3 else 1.0) for i in range(6)]
    denoiser = short(model, looking(ALWAYS))
    _, reasons = run(denoiser, controls)
    assert [i for i, reason in enumerate(reasons) if reason == "control changed"] == [3]
    _, reasons = run(denoiser, [*controls[:2], *[{}] * 4])
    assert reasons == ["nothing cached", None, "control changed", None, None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"backend": "eager"}, {"mode": "reduce-overhead"}], ids=str)
def test_on_a_gpu(model, options):
    model, changing = model.cuda(), [2.0 if i >= 3 else 1.0 for i in range(6)]
    for policy in (ALWAYS, StepSchedule(mask=[True] * 6)):
        denoiser = fxcache.transform(model, looking(policy), **options)
        for _ in range(3):
            with denoiser.trajectory(num_steps=6):
                for i, scale in enumerate(changing):
                    given = sample(), times(1 - i / 6), control(scale)
                    denoiser(*(value.cuda() for value in given))
        assert hits(denoiser) == [False, True, True, False, True, True] * 3


# --- the option, and messages ---


@pytest.mark.parametrize("value", [-0.1, math.nan, "0.1", True])
@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_the_option_is_checked(policy, value):
    with pytest.raises(PolicyError, match=r"^control_threshold must be .*\[0, inf\]") as error:
        replace(policy, control_threshold=value)
    assert repr(value) in str(error.value)


REUSE = Reuse()


@dataclass(frozen=True)
class Own:
    """Somebody's policy that knows nothing of the option."""

    probe: HeadResidual = HeadResidual()
    span: Span = Span(head_blocks=1)
    forecast: Forecast = REUSE
    decide: str = "each"

    def rule(self, metric, history):
        return Decision(bool(history.past), None if history.past else "nothing cached")


@dataclass(frozen=True)
class OwnLooking(Own):
    control_threshold: float = 0.1


@pytest.mark.parametrize(("policy", "is_hit"), [(Own(), True), (OwnLooking(), False)])
def test_policies_of_users(model, policy, is_hit):
    denoiser = plain(model, policy)
    run(denoiser, [control(), control(2.0)])
    assert hits(denoiser) == [False, is_hit]


@pytest.mark.parametrize(
    ("policy", "decide"),
    [(ALWAYS, "each"), (ALWAYS, "first"), (StepSchedule(mask=[True] * STEPS), "first")],
    ids=name_of,
)
def test_a_policy_that_never_hits_for_the_controls_sake_says_so(model, caplog, policy, decide):
    denoiser = plain(model, looking(replace(policy, decide=decide)))
    for _ in range(2):
        with denoiser.trajectory(num_steps=STEPS):
            for i in range(STEPS):
                for branch, scale in (("cond", 1 + 0.25 * (i % 2)), ("uncond", 1.0)):
                    with denoiser.branch(branch):
                        denoiser(sample(), times(1 - i / STEPS), control(scale))
    messages = [record.message for record in caplog.records if "never hit" in record.message]
    assert len(messages) == (decide == "first")  # else the other branch hits
    for message in messages:
        assert f"{type(policy).__name__}(control_threshold=0.1)" in message
        assert "in branch 'cond'" in message
        assert re.search(r"at 7 of the 7 .* conditioning .* by up to 0.25\.", message)
        assert "A control_threshold above 0.25 would" in message


def test_a_control_that_is_not_to_blame_is_not_blamed(model, caplog):
    denoiser = plain(model, looking(FirstBlockCache(threshold=1e-9)))
    run(denoiser, [control(1 + i) for i in range(STEPS)])
    (message,) = [record.message for record in caplog.records if "never hit" in record.message]
    assert "conditioning" not in message
