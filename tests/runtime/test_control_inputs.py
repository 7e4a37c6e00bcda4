"""Conditioning inputs that come and go, which inputs they are, and what keeping them costs."""

import math
from itertools import product

import pytest
import torch
from controlled import Controlled, control, looking, run
from helpers import ALWAYS, NEVER, adopt, assert_identical, hits, plain, sample, seeded, times
from opened import Small, opened

from fxcache.runtime.conditions import Conditions


@pytest.fixture
def model():
    return seeded(Controlled)


# --- inputs that come and go ---


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
            assert_identical(outputs[3], model(sample() + 0.03, times(0.5), residual))


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
        denoiser(sample() + 0.01 * i, times(1 - i / 6), **given)
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
    assert_identical(outputs[2], model(sample() + 0.02, times(0.5), None, control()))


def test_another_shape_is_a_new_trajectory(model):
    denoiser = plain(model, looking(ALWAYS))
    wide = {"features": torch.randn(2, 5, 16)}
    narrow = {"features": torch.randn(2, 4, 16)}
    run(denoiser, [wide, wide, narrow, narrow], announced=False)
    assert [record.step for record in denoiser.report().records] == [0, 1, 0, 1]
    _, reasons = run(denoiser, [narrow, narrow, wide, wide])
    assert [reason is None for reason in reasons] == [False, True, False, True]


# --- what it costs, and what is left ---


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
