"""`fxcache.apply` on a small loop with real schedulers: steps, trajectories, branches, removal.

Pipelines of diffusers themselves are in test_pipelines.py.
"""

import logging
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from comparing import assert_identical
from helpers import adopt, plain, seeded
from loops import Flow, Pipe
from opened import Small
from policies import ALTERNATE, ALWAYS, NEVER

import fxcache
from fxcache import FirstBlockCache, MagCache, OptionError, PolicyError, StepSchedule


def apply(pipe, policy=ALTERNATE):
    return fxcache.apply(pipe, policy, backend="eager")


@pytest.fixture
def pipe():
    return Pipe()


def steps(handle, branch=None):
    return [r.step for r in handle.report().records if r.branch == branch]


def test_a_run_is_a_trajectory(pipe):
    expected = pipe(4)
    with apply(pipe, NEVER) as handle:
        assert_identical(pipe(4), expected)
        assert_identical(pipe(4), expected)
        assert steps(handle) == [0, 1, 2, 3] * 2
        assert len({r.trajectory for r in handle.report().records}) == 2
    assert_identical(pipe(4), expected)


def test_steps_are_those_of_the_schedule(pipe):
    """Their number, timesteps of the caller, and a run that begins amid the schedule."""
    with apply(pipe, FirstBlockCache(threshold=math.inf, start=0.5, end=0.8)) as handle:
        pipe(10)
        pipe(4)
        is_hit = [r.is_hit for r in handle.report().records]
        assert [i for i, hit in enumerate(is_hit[:10]) if hit] == [5, 6, 7]
        assert [i for i, hit in enumerate(is_hit[10:]) if hit] == [2, 3]

        adopt(pipe.transformer, StepSchedule(mask=[False, True, False]))
        for custom in ({"sigmas": [1.0, 0.7, 0.3]}, {"timesteps": [900.0, 500.0, 9.0]}):
            handle.reset()
            pipe(**custom)
            decided = [(r.step, r.is_hit) for r in handle.report().records]
            assert decided == [(0, False), (1, True), (2, False)], custom

        mask = [False, True, True, False, False, True, False, True]
        adopt(pipe.transformer, StepSchedule(mask=mask))
        pipe(8, begin=3)
        assert steps(handle) == [3, 4, 5, 6, 7]
        assert [r.is_hit for r in handle.report().records] == mask[3:]


def test_schedulers_that_do_not_count(pipe):
    """They have no step index: the first step is found by its timestep, the others follow."""
    with apply(pipe, ALWAYS) as handle:
        for scheduler in (
            diffusers.DDIMScheduler(),
            diffusers.DDPMScheduler(),
            diffusers.PNDMScheduler(skip_prk_steps=True),
        ):
            handle.reset()
            pipe.scheduler, name = scheduler, type(scheduler).__name__
            pipe(6)
            assert sorted(set(steps(handle))) == list(range(6)), name
            before = len(handle.report().records)
            pipe(6, begin=2)
            records = handle.report().records[before:]
            assert len({r.trajectory for r in records}) == 1, name
            assert records[0].step == (2 if name != "PNDMScheduler" else 1)  # a second is repeated
            assert records[-1].step == 5, name
            assert not records[0].is_hit, name


def test_two_evaluations_at_one_timestep_are_one_step(pipe):
    mask = [False, True, False, True, False]
    with apply(pipe, StepSchedule(mask=mask)) as handle:
        for name in ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
            handle.reset()
            pipe.scheduler = getattr(diffusers, name)()
            pipe(5)
            records = handle.report().records
            assert [r.step for r in records] == [0, 1, 1, 2, 2, 3, 3, 4, 4], name
            assert [r.is_hit for r in records] == [mask[r.step] for r in records], name
            assert {r.branch for r in records} == {None}, name


def test_schedulers_that_count(pipe):
    with apply(pipe, ALTERNATE) as handle:
        for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler",
                     "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler",
                     "EDMEulerScheduler"):  # fmt: skip
            handle.reset()
            pipe.scheduler = getattr(diffusers, name)()
            pipe(5)
            pipe(5)
            records = handle.report().records
            number = len(pipe.scheduler.timesteps)
            assert [r.step for r in records] == [*range(number)] * 2, name
            assert not records[0].is_hit, name
            assert not records[number].is_hit, name


def test_an_interrupted_run_leaves_nothing_to_the_next(pipe):
    """And the scheduler may be replaced."""
    with apply(pipe) as handle:
        expected = pipe(5, seed=3)
        handle.reset()
        with pytest.raises(KeyboardInterrupt):
            pipe(5, stop=2)
        assert_identical(pipe(5, seed=3), expected)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
        pipe(3)
        assert steps(handle) == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2]


def test_other_shapes_within_a_run(pipe):
    """A change of layout is a miss, and not another trajectory: the scheduler goes on. So where
    guidance ends amid a run what was cached of two branches is not used for one.
    """
    pipe.scheduler.set_timesteps(6)
    pipe.scheduler.set_begin_index(0)
    with fxcache.apply(pipe, ALWAYS, backend="eager", dynamic=False) as handle:
        for step, t in enumerate(pipe.scheduler.timesteps):
            x = torch.ones(2 if step < 2 else 1, 8 if step < 4 else 4, 4)
            pipe.transformer(x, t.expand(len(x)) / 1000)
            pipe.scheduler.step(x, t, x)
        records = handle.report().records
    assert handle.report().records == ()
    assert [(r.step, r.is_hit) for r in records] == [(i, i % 2 == 1) for i in range(6)]
    assert {r.trajectory for r in records} == {1}
    assert [r.step for r in records if r.reason == "nothing cached"] == [0, 2, 4]


def test_branches_never_mix(pipe):
    """Each call of a step gets what it gets if it is the only one, whether it has a name or not."""
    calls = []
    with apply(pipe, MagCache(ratios=[1.0] * 6, retention_ratio=0.0)) as handle:
        denoiser = pipe.transformer
        denoiser.register_forward_hook(lambda _, args, out: calls.append((args, out.clone())))
        for names in ((), ("cond", "uncond")):
            handle.reset()
            calls.clear()
            pipe(6, calls=2, names=names)
            first, second = names or (None, "call 2")
            assert steps(handle, first) == steps(handle, second) == [*range(6)]
            assert handle.report().hits > 0
            for number, own in enumerate((calls[:12:2], calls[1:12:2])):
                with denoiser.slot(number), denoiser.trajectory(6):
                    for args, output in own:
                        assert_identical(denoiser(*args), output)
            assert not torch.equal(calls[10][1], calls[11][1])


def test_a_branch_that_comes_and_goes(pipe):
    pipe.scheduler.set_timesteps(5)
    with torch.no_grad(), apply(pipe, ALWAYS) as handle:
        for step, t in enumerate(pipe.scheduler.timesteps):
            x = torch.ones(1, 8, 4)
            for _ in range(2 if step in (1, 3, 4) else 1):
                pipe.transformer(x, t.expand(1) / 1000)
            pipe.scheduler.step(x, t, x)
        assert steps(handle) == [0, 1, 2, 3, 4]
        assert steps(handle, "call 2") == [1, 3, 4]


def test_two_denoisers_share_the_steps(pipe):
    """Each expert knows the steps of the whole schedule."""
    pipe.transformer_2 = seeded(Small)
    handle = apply(pipe, StepSchedule(mask=[False, True, False, False, True, True]))
    pipe.scheduler.set_timesteps(6)
    x = torch.ones(1, 8, 4)
    for step, t in enumerate(pipe.scheduler.timesteps):
        model = pipe.transformer if step < 3 else pipe.transformer_2
        x = pipe.scheduler.step(model(x, t.expand(1) / 1000), t, x, return_dict=False)[0]
    records = handle.report().records
    assert [(r.component, r.step, r.is_hit) for r in records] == [
        ("transformer", 0, False), ("transformer", 1, True), ("transformer", 2, False),
        ("transformer_2", 3, False), ("transformer_2", 4, True), ("transformer_2", 5, True),
    ]  # fmt: skip
    assert handle.report().cached_bytes == sum(
        d.report().cached_bytes for d in handle.denoisers.values()
    )


def test_a_scheduler_that_does_not_move_is_not_believed(pipe):
    """A pipeline made of another's parts with a scheduler of its own, or a loop without one; also
    after an interrupted run.
    """
    other = Pipe()
    with apply(pipe, MagCache(ratios=[1.0] * 6, retention_ratio=0.0)) as handle:
        expected = pipe(6, seed=5)
        assert handle.report().hits > 0
        handle.reset()
        pipe(6)
        other.transformer = pipe.transformer
        for _ in range(2):
            other(6, seed=5)
        assert [r.step for r in handle.report().records[6:]] == [*range(6)] * 2
        assert_identical(other(6, seed=5), expected)
        assert_identical(pipe(6, seed=5), expected)
        for stop in (0, 1, 3):
            handle.reset()
            with pytest.raises(KeyboardInterrupt):
                pipe(6, stop=stop)
            other(6, seed=1)
            assert_identical(other(6, seed=5), expected)


def test_a_trajectory_that_is_announced_goes_before(pipe):
    pipe.scheduler.set_timesteps(6)
    with torch.no_grad(), apply(pipe, ALWAYS) as handle:
        with pipe.transformer.trajectory(num_steps=3, first_step=1):
            for t in (0.7, 0.2):
                pipe.transformer(torch.ones(1, 8, 4), torch.tensor([t]))
        assert steps(handle) == [1, 2]


def test_only_the_denoiser_is_replaced_and_given_back(pipe):
    other, before, model = Pipe(), dict(vars(pipe)), pipe.transformer
    handle = apply(pipe, ALWAYS)
    assert handle.policy == ALWAYS
    assert isinstance(pipe.transformer, Small)
    assert {name for name in before if vars(pipe)[name] is not before[name]} == {"transformer"}
    assert handle.denoisers == {"transformer": pipe.transformer}
    pipe(4)
    for _ in range(2):  # once more does nothing
        handle.remove()
        assert vars(pipe) == before
        assert pipe.transformer is model
    assert type(other.transformer) is Small
    assert "step" not in vars(pipe.scheduler)


def test_a_component_that_was_replaced_meanwhile_is_left(caplog):
    pipe = Pipe()
    handle = apply(pipe)
    pipe.transformer = other = seeded(Small)
    with caplog.at_level(logging.WARNING, "fxcache"):
        handle.remove()
    assert pipe.transformer is other
    assert "transformer of the pipeline was replaced" in caplog.text


def test_refusals(pipe):
    for bad, message in (
        (pipe.transformer, "is a model, not a pipeline"),
        ("flux", "must be a pipeline of diffusers, got 'flux'"),
        (diffusers.FluxPipeline, "must be a pipeline of diffusers"),
        (SimpleNamespace(scheduler=Flow(), transformer=None, components={"vae": 1}),
         r"has no denoiser: .* it has \['vae'\]"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            fxcache.apply(bad)
    handle = apply(pipe)
    with pytest.raises(OptionError, match=r"denoiser already: call remove\(\)"):
        apply(pipe)
    handle.remove()
    model, pipe.transformer_2 = pipe.transformer, plain(seeded(Small))
    with pytest.raises(OptionError, match="transformer_2 of this Pipe is a denoiser already"):
        apply(pipe)
    assert pipe.transformer is model  # nothing is half applied
    del pipe.transformer_2
    for bad in (3, MagCache):
        with pytest.raises(PolicyError, match="policy must be a policy"):
            apply(pipe, bad)
    with pytest.raises(PolicyError, match=r"one entry for each denoiser, \['transformer'\]"):
        apply(pipe, {"unet": None})
    with pytest.raises(OptionError, match="unknown backend"):
        fxcache.apply(pipe, backend="nope")
    assert type(pipe.transformer) is Small
    assert not isinstance(pipe.transformer, fxcache.denoiser.DenoiserMethods)
