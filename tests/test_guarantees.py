"""What holds for every model and policy: the guarantees of docs/design.md, as one matrix.

Each test captures a model once and asks everything of it. Odd cases have tests of their own, by
the room that they belong to.
"""

import math
from dataclasses import replace

import pytest
import torch
from comparing import assert_identical, tensors
from helpers import plain, sample, seeded, times
from opened import Small
from policies import POLY, name_of
from policy_cases import moving
from zoo import SAMPLES, SequentialDiT, StructuredDiT, UViT, at_step, make

import fxcache

STEPS = 7
FIRST = fxcache.FirstBlockCache(threshold=math.inf, max_consecutive_hits=2)
FORECAST = replace(FIRST, warmup_steps=2, forecast=fxcache.Taylor(order=2))
EASY = fxcache.EasyCache(threshold=math.inf, warmup_steps=2, max_consecutive_hits=2)
ADAPTIVE = fxcache.AdaptiveCache(tolerance=1e9, max_consecutive_hits=2)
SCHEDULE = fxcache.StepSchedule(
    mask=[False, False, True, False, True, True, False], forecast=fxcache.Taylor()
)
MAG = fxcache.MagCache(ratios=[1.0, *[1.05] * 6], threshold=0.5, retention_ratio=0.0)
TEA = fxcache.TeaCache(coefficients=POLY, threshold=math.inf, max_consecutive_hits=2)
SEA = fxcache.SeaCache(threshold=math.inf, max_consecutive_hits=2)
POLICIES = [FIRST, FORECAST, EASY, ADAPTIVE, SCHEDULE, MAG, TEA, SEA]

#: Every policy; what finds its place in dicts and tuples; what is skipped below a level of skips.
WRITTEN = {
    SequentialDiT: POLICIES,
    StructuredDiT: [FORECAST, EASY, ADAPTIVE, SCHEDULE, TEA],
    UViT: [FORECAST, ADAPTIVE, SCHEDULE, TEA],
}
#: Two kinds of blocks; two streams; a U shape; another stack beside; video.
DIFFUSERS = {
    "flux": [FORECAST],
    "sd3": [FORECAST],
    "sd15_unet": [ADAPTIVE],
    "wan_vace": [FIRST],
    "ltx_video": [EASY],
}
CASES = [(name, policy) for name, own in {**WRITTEN, **DIFFUSERS}.items() for policy in own]


def never(policy):
    """`policy` without a hit, by the number that says so."""
    if isinstance(policy, fxcache.StepSchedule):
        return replace(policy, mask=[False] * len(policy.mask))
    number = "tolerance" if isinstance(policy, fxcache.AdaptiveCache) else "threshold"
    return replace(policy, **{number: 0.0})


def subject(model):
    """The model, and its inputs at a step."""
    if isinstance(model, str):
        made, inputs = make(model)

        def of_zoo(step, seed=0):
            return changed(at_step(model, inputs, step), lambda x: x * (1 + seed))

        return made, of_zoo

    def given(step, seed=0, batch=2, tokens=8):
        x = moving(sample(batch, tokens, seed), step)
        return {"x": x, "t": times(1 - step / STEPS, batch)}

    return seeded(model), given


def run(denoiser, given, steps=STEPS, **at):
    """Outputs and hits of one trajectory. What is returned is written to: that changes nothing."""
    outputs = []
    with denoiser.trajectory(steps):
        for step in range(steps):
            returned = tensors(denoiser(**given(step, **at)))
            outputs.append([tensor.clone() for tensor in returned])
            for tensor in returned:
                tensor.fill_(math.nan)
    records = denoiser.report().records[-steps:]
    assert [r.step for r in records] == list(range(steps))
    assert all((r.reason is None) == r.is_hit for r in records)
    return outputs, [r.is_hit for r in records]


def changed(inputs, change):
    """`inputs` with another sample."""
    name = next(name for name in SAMPLES if name in inputs)
    return {**inputs, name: change(inputs[name])}


def assert_follows_the_input(denoiser, given, made):
    """A hit on another sample gives something else."""
    at = made.index(True)
    outputs = []
    for change in (lambda x: x, lambda x: x + 0.1 * torch.randn_like(x)):
        with denoiser.trajectory(STEPS):
            for step in range(at):
                denoiser(**given(step))
            outputs.append(tensors(denoiser(**changed(given(at), change))))
        assert denoiser.report().records[-1].is_hit
    assert not torch.equal(outputs[0][0], outputs[1][0])


def assert_nan_is_left_behind(denoiser, given, expected):
    """A broken sample breaks nothing but its own output, and is computed where it is measured.

    What neither measures nor checks reuses what was computed, but for this trajectory only.
    """
    made, sees = expected[1], denoiser.policy.probe is not None
    checks = isinstance(denoiser.policy, fxcache.AdaptiveCache)
    for broken in (0, made.index(True), STEPS - 1):
        with denoiser.trajectory(STEPS):
            for step in range(STEPS):
                inputs = given(step)
                if step == broken:
                    inputs = changed(inputs, lambda x: x * math.nan)
                finite = all(t.isfinite().all() for t in tensors(denoiser(**inputs)))
                assert finite == (step != broken) or not (sees or checks), step
        if sees:
            assert not denoiser.report().records[broken - STEPS].is_hit
        assert_same(run(denoiser, given), expected)


def assert_branches_stand_alone(denoiser, given):
    """Two branches in turn give what each gives alone."""
    together = {"cond": [], "uncond": []}
    with denoiser.trajectory(STEPS):
        for step in range(STEPS):
            for seed, name in enumerate(together):
                with denoiser.branch(name):
                    together[name].append(tensors(denoiser(**given(step, seed=seed))))
    for seed, name in enumerate(together):
        with denoiser.trajectory(STEPS), denoiser.branch(name):
            for step, output in enumerate(together[name]):
                assert_identical(denoiser(**given(step, seed=seed)), output)


def assert_nothing_is_cached_with_gradients(denoiser, model, given):
    """Values and gradients are the model's own, hit or not."""
    weight, found = next(model.parameters()), []
    with denoiser.trajectory(STEPS):
        for step in range(STEPS):
            denoiser(**given(step))
            for each in (denoiser, model):
                with torch.enable_grad():
                    loss = sum(t.double().square().sum() for t in tensors(each(**given(step))))
                found.append((loss.detach(), torch.autograd.grad(loss, weight)[0]))
    for mine, own in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(mine, own)


def assert_same(actual, expected):
    """The same outputs, bit for bit, and the same decisions."""
    assert actual[1] == expected[1]
    for mine, own in zip(actual[0], expected[0], strict=True):
        assert_identical(mine, own)


@pytest.mark.parametrize(("name", "policy"), CASES, ids=name_of)
def test_guarantees(name, policy):
    model, given = subject(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    denoiser = plain(model, never(policy), audit=False)
    assert isinstance(denoiser, type(model))
    assert list(denoiser.state_dict()) == list(before)

    # 1: nothing skipped is the model itself; 3: inputs are as they were
    with denoiser.trajectory(STEPS):
        for step in range(3):
            inputs = given(step)
            copies = [tensor.clone() for tensor in tensors(inputs)]
            assert_identical(denoiser(**inputs), model(**inputs))
            assert_identical(inputs, copies)
    assert not denoiser.report().hits

    graphs = denoiser.report().graphs
    denoiser.policy = policy
    first = run(denoiser, given)
    assert any(first[1])
    assert not first[1][0]
    assert_follows_the_input(denoiser, given, first[1])
    assert_nan_is_left_behind(denoiser, given, first)
    assert_branches_stand_alone(denoiser, given)
    assert_nothing_is_cached_with_gradients(denoiser, model, given)

    # 4: nothing outlives its trajectory
    run(denoiser, given, seed=1)
    assert_same(run(denoiser, given), first)
    with denoiser.trajectory(STEPS):
        denoiser(**given(0))
        with pytest.raises(TypeError):
            denoiser(**given(1), unknown=1)
    assert_same(run(denoiser, given), first)
    assert denoiser.report().graphs == graphs

    assert fxcache.restore(denoiser) is model
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


OPTIONS = {
    "dynamic sizes": {"dynamic": True},
    "fixed sizes": {"dynamic": False},
    "not outlined": {"outline": False},
    "pieces": {"fullgraph": False},
    "guards a trajectory": {"guards": "trajectory"},
    "host memory": {"cache_device": "cpu"},
    "half residuals": {"cache_dtype": torch.float16},
    "8-bit residuals": {"cache_dtype": torch.float8_e4m3fn},
    "no sharing": {"sync": None},
    "plain kernels": {"kernel": "aten"},
}


@pytest.mark.parametrize("policy", [FIRST, ADAPTIVE], ids=name_of)
def test_options_change_no_guarantee(policy):
    model, given = subject(Small)
    expected = run(plain(model, policy), given)
    for name, options in OPTIONS.items():
        denoiser = plain(model, never(policy), **options)
        with denoiser.trajectory(STEPS):
            for step in range(3):
                assert_identical(denoiser(**given(step)), model(**given(step)))
        denoiser.policy = policy
        first = run(denoiser, given)
        assert first[1] == expected[1], name
        if "cache_dtype" not in options:
            assert_same(first, expected)
        assert_same(run(denoiser, given), first)


@pytest.mark.parametrize("policy", [FIRST, ADAPTIVE], ids=name_of)
def test_other_sizes_are_another_trajectory(policy):
    """They are those of a fresh denoiser, whatever was there before."""
    model, given = subject(Small)
    used, fresh = (plain(model, policy, dynamic=True) for _ in range(2))
    for seed, batch, tokens, steps in ((0, 2, 8, 7), (1, 3, 8, 7), (2, 2, 5, 5), (0, 2, 8, 6)):
        at = {"seed": seed, "batch": batch, "tokens": tokens}
        fresh.reset()
        assert_same(run(used, given, steps, **at), run(fresh, given, steps, **at))


@pytest.mark.parametrize("policy", [FIRST, ADAPTIVE], ids=name_of)
def test_the_registered_backend(policy):
    """Without a denoiser: the same decisions from timesteps alone, and nothing that is left."""
    model, given = subject(Small)
    expected = plain(model, policy)
    options = {"policy": policy, "backend": "eager"}
    compiled = torch.compile(model, backend="fxcache", options=options)
    for _ in range(2):
        for step in range(STEPS):
            assert_identical(compiled(**given(step)), expected(**given(step)))
    assert expected.report().hits
