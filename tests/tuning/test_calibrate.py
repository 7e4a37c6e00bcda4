"""Calibration: what is recorded of a sampler's runs, and the file that holds it."""

import functools
import json
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache
from helpers import plain, sample, seeded
from opened import Small
from samplers import STEPS, euler, guided, observers
from torch import nn

import fxcache
from fxcache import FirstBlockCache, MagCache, PolicyError, ProfileError, Taylor, TeaCache
from fxcache.pipelines.tiny import tiny_model

calibrate = functools.partial(fxcache.calibrate, progress=False)


class Watched:
    """Hooks that keep the input of `first` and what `last` and the model return, in float64."""

    def __init__(self, model, first, last):
        self.inputs, self.results, self.outputs = [], [], []
        self.handles = [
            first.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0].double())),
            last.register_forward_hook(lambda _m, _a, out: self.results.append(out.double())),
            model.register_forward_hook(lambda _m, _a, out: self.outputs.append(out.double())),
        ]

    @property
    def residuals(self):
        return [b - a for a, b in zip(self.inputs, self.results, strict=True)]


def watched(model, run, first=0):
    seen = Watched(model, model.blocks[first], model.blocks[-1])
    run(model)
    for handle in seen.handles:
        handle.remove()
    return seen


def ratios_of(residuals):
    """The formula of diffusers' MagCacheBlockHook, in float64."""
    ratios = [1.0]
    for before, now in pairwise(residuals):
        ratios.append(float((now.norm(dim=-1) / (before.norm(dim=-1) + 1e-8)).mean()))
    return ratios


def test_ratios_are_those_of_the_residual_of_all_blocks(model):
    profile = calibrate(model, euler, runs=3)
    per_run = [ratios_of(watched(model, lambda m, s=s: euler(m, s)).residuals) for s in range(3)]
    assert list(profile.ratios) == ["cond"]
    np.testing.assert_allclose(profile.ratios["cond"], np.mean(per_run, axis=0), rtol=1e-5)
    policy = profile.policy(threshold=0.5)
    assert policy == MagCache(ratios=profile.ratios["cond"], threshold=0.5, origin=policy.origin)
    assert policy.origin.model_classes == ("Small",)
    denoiser = plain(model, policy)
    euler(denoiser)
    assert denoiser.report().hits > 0


def test_ratios_by_branch(model):
    profile = calibrate(plain(model), guided, runs=1)
    model.branch = lambda name: torch.no_grad()
    residuals = watched(model, guided).residuals
    for place, branch in enumerate(["cond", "uncond"]):
        expected = ratios_of(residuals[place::2])
        np.testing.assert_allclose(profile.ratios[branch], expected, rtol=1e-5)
    assert profile.ratios["cond"] != profile.ratios["uncond"]
    assert profile.policy().ratios == profile.ratios


def test_diffusers_own_calibration(capsys):
    def run(transformer, seed=0):
        given = {**inputs, "hidden_states": torch.randn(inputs["hidden_states"].shape)}
        with torch.no_grad():
            for t in torch.linspace(1, 0.25, 4):
                out = transformer(**{**given, "timestep": t.expand(1)}).sample
                given["hidden_states"] = given["hidden_states"] - out / 4
        return given["hidden_states"]

    torch.manual_seed(0)
    model, inputs = tiny_model("FluxTransformer2DModel")
    profile = calibrate(model, run, seeds=[5])
    apply_mag_cache(model, MagCacheConfig(calibrate=True, num_inference_steps=4))
    torch.manual_seed(5)
    run(model)
    printed = json.loads(capsys.readouterr().out.splitlines()[2])
    np.testing.assert_allclose(profile.ratios["cond"], printed, rtol=1e-4)


def test_pairs_and_polynomial_of_teacache(model):
    profile = calibrate(model, euler, TeaCache, runs=4)
    expected = []
    for seed in range(4):
        modulated = []
        hook = model.blocks[0].norm.register_forward_hook(
            lambda _m, _a, out, kept=modulated: kept.append(out.double())
        )
        seen = watched(model, lambda m, s=seed: euler(m, s))
        hook.remove()
        for values in zip(modulated, modulated[1:], seen.outputs, seen.outputs[1:], strict=False):
            p0, p1, o0, o1 = values
            diff, change = (p1 - p0).abs().sum() / p0.abs().sum(), (o1 - o0).abs().sum()
            expected.append((float(diff), float(change / o0.abs().sum())))
    assert profile.pairs.shape == (4 * (STEPS - 1), 2)
    np.testing.assert_allclose(profile.pairs, expected, rtol=1e-4)
    x, y = profile.pairs.T.numpy()
    np.testing.assert_allclose(profile.coefficients(), np.polyfit(x, y, 4), rtol=1e-4)
    policy = profile.policy(threshold=0.1, final_steps=0)
    assert isinstance(policy, TeaCache)
    assert policy.coefficients == profile.coefficients()
    assert policy.score(x[0]) == pytest.approx(abs(np.polyval(np.polyfit(x, y, 4), x[0])), rel=1e-4)


def test_errors_of_forecasters(model):
    profile = calibrate(model, euler, runs=1)
    residuals = watched(model, euler).residuals
    assert all(len(errors) == STEPS for errors in profile.errors.values())
    for name, forecast, ring in (
        ("Reuse", fxcache.Reuse(), 1),
        ("Taylor(2)", Taylor(order=2), 3),
        ("Hermite(1)", fxcache.Hermite(order=1), 2),
        ("Chebyshev(2)", fxcache.Chebyshev(order=2), 5),
    ):
        assert all(math.isnan(error) for error in profile.errors[name][:ring])
        for step in range(ring, STEPS):
            past = range(step - 1, step - 1 - ring, -1)
            weights = forecast.weights(step, past)
            predicted = sum(w * residuals[at] for w, at in zip(weights, past, strict=True))
            direct = (predicted - residuals[step]).norm() / residuals[step].norm()
            assert profile.errors[name][step] == pytest.approx(float(direct), rel=1e-2, abs=1e-4)


def test_instances_and_other_policies_are_recorded_as_they_are():
    """With their own first block of the span."""
    model = seeded(lambda: Small(3))
    kept = FirstBlockCache(head_blocks=2, end=0.9, forecast=Taylor(order=2))
    profile = calibrate(model, euler, kept, runs=1)
    expected = ratios_of(watched(model, euler, first=2).residuals)
    np.testing.assert_allclose(profile.ratios["cond"], expected, rtol=1e-5)
    with pytest.raises(PolicyError, match="MagCache and TeaCache, got 'FirstBlockCache'"):
        profile.policy()
    kinds = {fxcache.EasyCache: 2, fxcache.SeaCache: 1, fxcache.StepSchedule: STEPS}
    for policy, first in kinds.items():
        profile = calibrate(model, euler, policy, runs=1)
        assert profile.metadata["method"] == policy.__name__
        assert len(profile.pairs) == STEPS - first  # not of steps that have no metric
        assert all(error > 0 for error in profile.errors["Reuse"][1:])


def test_trajectories_that_rise_or_are_announced_or_show_no_time(model):
    expected = ratios_of(watched(model, lambda m: euler(m, rising=True)).residuals)
    rising = calibrate(model, lambda m, seed: euler(m, seed, rising=True), seeds=[0])
    np.testing.assert_allclose(rising.ratios["cond"], expected, rtol=1e-5)
    denoiser = plain(model)

    def announced(seed):
        for part in range(2):
            with denoiser.slot(part), denoiser.trajectory(STEPS):
                euler(denoiser, 2 * seed + part)

    twice, four = calibrate(denoiser, announced), calibrate(model, euler, runs=4)
    np.testing.assert_allclose(twice.ratios["cond"], four.ratios["cond"], rtol=1e-6)


def test_a_model_without_time():
    """Only a new run tells that a trajectory is new."""

    class Timeless(Small):
        def forward(self, x):
            return super().forward(x, x.new_ones(len(x)))

    @torch.no_grad()
    def run(denoiser, seed):
        x = sample(seed=seed)
        for _ in range(4):
            x = x - denoiser(x) / 4

    assert calibrate(seeded(Timeless), run, runs=3).num_steps == 4


def test_heun(model):
    """The second evaluation at a time (the next step's first) stands for the step."""
    profile = calibrate(model, lambda m, seed: euler(m, seed, heun=True), seeds=[0])
    residuals = watched(model, lambda m: euler(m, heun=True)).residuals
    assert len(residuals) == 2 * STEPS - 1
    np.testing.assert_allclose(profile.ratios["cond"], ratios_of(residuals[::2]), rtol=1e-5)


def test_trajectories_that_do_not_fit(denoiser):
    for run, message in (
        (lambda m, seed: euler(m, seed, steps=5 + seed), "5 of steps 0 to 4', '6 of steps 0 to 5"),
        (lambda m, seed: euler(m, seed, steps=1), "at least 2"),
        (lambda m, seed: guided(m, seed, last=3), "'uncond': .'3 of steps 0 to 2'"),
        (lambda m, seed: sample(), "did not call the denoiser"),
        (lambda m, seed: torch.enable_grad()(euler.__wrapped__)(m), "under torch.no_grad()"),
    ):
        with pytest.raises(ProfileError, match=message):
            calibrate(denoiser, run)

    def late():
        with denoiser.trajectory(10, first_step=4):
            euler(denoiser, steps=6)

    with pytest.raises(ProfileError, match="6 of steps 4 to 9"):
        calibrate(denoiser, late)


def test_residuals_that_make_no_table(model):
    for value, message in ((math.nan, "finite"), (0.0, "in .0, inf.")):
        for block in model.blocks:
            nn.init.constant_(block.proj.weight, value)
            nn.init.constant_(block.proj.bias, value)
        with pytest.raises(ProfileError, match=message):
            calibrate(model, euler)


def test_bad_options_are_named(model):
    for policy in ("MagCache", int, None, 3):
        with pytest.raises(PolicyError, match="policy must be one of EasyCache, FirstBlockCache"):
            calibrate(model, euler, policy)
    for options, message in (
        ({"runs": 0}, "runs must be an integer at least 1, got 0"),
        ({"runs": 1.5}, "runs must be an integer"),
        ({"seeds": []}, "seeds must hold one"),
        ({"seeds": [1, "a"]}, "seeds must be an integer at least 0, got 'a'"),
    ):
        with pytest.raises(PolicyError, match=message):
            calibrate(model, euler, **options)


def test_a_run_that_raises_changes_nothing(denoiser):
    euler(denoiser)
    before = denoiser.report(), denoiser.policy
    state = torch.get_rng_state()
    for call in (0, 2, STEPS + 2):
        calls = []

        def run(d, seed, call=call, calls=calls):
            def failing(*args):
                calls.append(args)
                if len(calls) > call:
                    raise KeyError("no picture")
                return d(*args)

            return euler(failing, seed)

        with pytest.raises(ProfileError, match=r"run raised KeyError with seed.*no pict") as raised:
            calibrate(denoiser, run)
        assert isinstance(raised.value.__cause__, KeyError)
        assert (denoiser.report(), denoiser.policy) == before
        assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyboardInterrupt):
        calibrate(denoiser, lambda d: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (denoiser.report(), denoiser.policy) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_left_behind(model, denoiser):
    euler(denoiser)
    before, keys, seen = denoiser.report(), set(model.__dict__), []

    def run(d, seed):
        out = euler(d, seed)
        seen.append(observers())
        return out

    number = observers()
    for target in (denoiser, model):
        with torch.enable_grad():
            calibrate(target, run, TeaCache, progress=True)
    assert len(seen) == 4
    assert min(seen) > number == observers()
    assert denoiser.report() == before
    assert set(model.__dict__) == keys
    assert not model._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks
    assert pickle.loads(pickle.dumps(model)).blocks
