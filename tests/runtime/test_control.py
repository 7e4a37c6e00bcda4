"""Conditioning that changes, comes and goes along a trajectory, and `control_threshold`."""

import math
import re
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from comparing import assert_identical
from controlled import Controlled, at, control, looking, run
from helpers import adopt, graphed, hits, plain, sample, seeded, short, times
from opened import Small, opened
from policies import ALTERNATE, ALWAYS, EASY, MAG, NEVER, SEA, TEA, name_of

import fxcache
from fxcache import FirstBlockCache, PolicyError, StepSchedule
from fxcache.policy import Decision, Forecast, Reuse, Span
from fxcache.policy.probe import HeadResidual
from fxcache.runtime.conditions import Conditions

STEPS = 8


@pytest.fixture
def model():
    return seeded(Controlled)


def test_a_miss_exactly_where_one_input_changes(model):
    """Each is looked at, and misses use the current ones."""
    denoiser = plain(model, looking(ALWAYS))
    given = {"control": control(), "features": control(seed=4), "strength": torch.ones(1)}
    for i in range(8):
        if i >= 2 and i % 2 == 0:
            given[list(given)[i // 2 - 1]] *= 1.5
        output = denoiser(*at(i, 8), **given)
        if i % 2 == 0:
            assert_identical(output, model(*at(i, 8), **given))
    reasons = [record.reason for record in denoiser.report().records]
    assert reasons == ["nothing cached", None, *["control changed", None] * 3]


def test_the_change_is_a_residual_diff_to_the_last_computed_step(model):
    """It grows by 4 % of the first a step: 4, 8, then 12; then 4/1.12 = 3.6, 7.1, 10.7. The
    threshold is strict, and 0 never hits.
    """
    denoiser = plain(model, looking(ALWAYS))
    _, reasons = run(denoiser, [control(1 + 0.04 * i) for i in range(8)])
    assert [i for i, reason in enumerate(reasons) if reason] == [0, 3, 6]
    assert set(reasons[1:]) == {None, "control changed"}
    for limit, is_hit in ((0.26, True), (0.25, False)):
        adopt(denoiser, looking(ALWAYS, limit))
        run(denoiser, [control(), control(1.25)])
        assert hits(denoiser) == [False, is_hit]
    adopt(denoiser, looking(ALWAYS, 0))
    outputs, reasons = run(denoiser, [control()] * 4)
    assert reasons == ["nothing cached", *["control changed"] * 3]
    assert_identical(outputs, [model(*at(i, 4), control()) for i in range(4)])


def test_misses_use_the_current_residuals(model):
    """Also where nobody looks at them."""
    denoiser, controls = plain(model, ALTERNATE), [control(1 + i) for i in range(4)]
    outputs, reasons = run(denoiser, controls)
    assert reasons == ["nothing cached", None, "max_consecutive_hits", None]
    for i in (0, 2):
        assert_identical(outputs[i], model(*at(i, 4), controls[i]))


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
    assert_identical(outputs[6], model(*at(6, STEPS), control(2.0)))


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


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_the_option_is_checked(policy):
    for value in (-0.1, math.nan, "0.1", True):
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


def test_policies_of_users(model):
    for policy, is_hit in ((Own(), True), (OwnLooking(), False)):
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


def test_residuals_that_end_are_no_new_trajectory(model):
    """T2I adapters work for a fraction of the steps: a miss, and the steps go on."""
    steps = [control()] * 3 + [{}] * 3
    for policy in (ALWAYS, looking(ALWAYS)):
        denoiser = plain(model, policy)
        for announced, given in product((True, False), (steps, steps[::-1])):
            denoiser.reset()
            outputs, reasons = run(denoiser, given, announced)
            assert reasons == ["nothing cached", None, None, "control changed", None, None]
            records = denoiser.report().records
            assert [record.step for record in records] == list(range(6))
            assert len({record.trajectory for record in records}) == 1
            residual = None if given is steps else control()
            assert_identical(outputs[3], model(*at(3, 6), residual))


class Adapted(Small):
    """Empties the list of features that it is given, as diffusers' UNets do."""

    def forward(self, x, t, residuals=None):
        h = self.embed(x) + self.time(t[:, None])[:, None]
        for block in self.blocks:
            h = block(h)
            if residuals:
                h = h + residuals.pop(0)
        return self.out(self.norm(h))


@pytest.mark.parametrize("dynamic", [None, True])
def test_adapter_features_that_end(dynamic):
    """What diffusers' T2I adapter pipelines do, without an announcement."""
    denoiser = plain(seeded(Adapted), looking(ALWAYS), dynamic=dynamic)
    for i in range(6):
        given = {"residuals": [control(), control(seed=4)]} if i < 3 else {}
        denoiser(*at(i, 6), **given)
        assert given.get("residuals", []) == []
    records = denoiser.report().records
    reasons = ["nothing cached", None, None, "control changed", None, None]
    assert [record.reason for record in records] == reasons
    assert [record.step for record in records] == list(range(6))
    assert {record.trajectory for record in records} == {records[0].trajectory}


def test_one_input_in_the_place_of_another(model):
    """The same layouts under other names: nothing of the one is reused for the other."""
    denoiser = plain(model, ALWAYS)
    features = {"features": control()}
    outputs, reasons = run(denoiser, [control(), control(), features, features], announced=False)
    assert reasons == ["nothing cached", None, "control changed", None]
    assert_identical(outputs[2], model(*at(2, 4), None, control()))


def test_another_shape_is_a_new_trajectory(model):
    denoiser = plain(model, looking(ALWAYS))
    wide = {"features": torch.randn(2, 5, 16)}
    narrow = {"features": torch.randn(2, 4, 16)}
    run(denoiser, [wide, wide, narrow, narrow], announced=False)
    assert [record.step for record in denoiser.report().records] == [0, 1, 0, 1]
    _, reasons = run(denoiser, [narrow, narrow, wide, wide])
    assert [reason is None for reason in reasons] == [False, True, False, True]


def test_none_costs_nothing_and_the_rest_is_counted(model, monkeypatch):
    asked = []
    change = Conditions.change
    monkeypatch.setattr(Conditions, "change", lambda *a: asked.append(1) or change(*a))
    without = opened(model, ALWAYS)
    run(without, [control()] * 4, announced=False)
    assert [executor.conditions for executor in without.executors()] == [None]
    denoiser = plain(model, looking(NEVER))
    run(denoiser, [control()] * 4, announced=False)
    assert not asked  # no hit was to be had: no read-back
    adopt(denoiser, looking(ALWAYS))
    given = {"control": control(), "features": control(), "strength": torch.ones(1)}
    run(denoiser, [given] * 4, announced=False)
    assert len(asked) == 3
    more = denoiser.report().cached_bytes - without.report().cached_bytes
    assert more == sum(value.numel() * 4 for value in given.values())
    denoiser.reset()
    assert denoiser.report().cached_bytes == 0


def test_another_set_of_inputs_is_a_change(model):
    """Whoever shares the state of another graph."""
    denoiser = opened(model, looking(ALWAYS))
    run(denoiser, [control()], announced=False)
    (executor,), (buffers,) = denoiser.executors(), denoiser.buffers()
    inputs = {place: control() for place in executor.conditions.places.values()}
    assert executor.conditions.change(inputs, buffers) == 0
    buffers.conditions["another"] = control()
    assert executor.conditions.change(inputs, buffers) == math.inf


def test_the_sample_and_the_time_are_no_conditioning():
    class TwoSamples(Controlled):
        """Pictures and sound: two noisy inputs, and a second time input."""

        def forward(self, x, timestep, sound, sound_timestep, control):
            y = super().forward(x, timestep, control)
            return y, sound * sound_timestep[:, None]

    denoiser = opened(seeded(TwoSamples), looking(ALWAYS))
    for i in range(4):
        t = times(1 - i / 4)
        denoiser(sample(seed=i), t, torch.randn(2, 5), t.clone(), control())
    (executor,) = denoiser.executors()
    assert len(executor.conditions.places) == 1
    assert hits(denoiser) == [False, True, True, True]


def test_nothing_outlives_its_trajectory(model):
    """The next one begins with a miss whatever its control, and compares with its own."""
    denoiser = plain(model, looking(ALWAYS))
    for scale in (1.0, 3.0, 3.0):
        _, reasons = run(denoiser, [control(scale)] * 3)
        assert reasons == ["nothing cached", None, None]
    with pytest.raises(RuntimeError):
        run(denoiser, [control(), control()[:, :3]])
    assert run(denoiser, [control(3.0)] * 2)[1] == ["nothing cached", None]


def test_copies_are_the_librarys_own(model):
    """The caller may write into its tensor; modes may take turns."""
    denoiser, own = plain(model, looking(ALWAYS)), control()
    with torch.inference_mode():
        denoiser(sample(), times(1.0), own)
    denoiser(sample(), times(0.9), own)
    own.mul_(2)
    denoiser(sample(), times(0.8), own)
    with torch.inference_mode():
        denoiser(sample(), times(0.7), own.clone())
    own.mul_(2)
    denoiser(sample(), times(0.6), own)
    assert hits(denoiser) == [False, True, False, True, False]
