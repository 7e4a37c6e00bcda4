"""How a user's sampling function is called, and what is made of what it returns."""

import functools
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samplers import STEPS, euler

import fxcache
from fxcache import OptionError, ProfileError, StepSchedule
from fxcache.tuning.record import Counter
from fxcache.tuning.sampling import arguments, as_tensor, psnr, sampler_for


def called(target, run, seed=5):
    """What `run` returns for `seed`, and how many steps were computed."""
    with (
        sampler_for(target, run) as sampler,
        sampler.following(StepSchedule(mask=[False])) as runner,
    ):
        result, counter = sampler.call(runner, seed, Counter)
    return result, counter.most


class Sampling(SimpleNamespace):
    def __call__(self, denoiser, seed):
        return euler(denoiser, seed)

    def method(self, seed):
        return euler(self.denoiser, seed)

    def other_order(self, seed, model):
        return euler(model, seed)


#: Functions of a denoiser, and the seed that they are to sample with.
FORMS = {
    "run()": (lambda d: lambda: euler(d, 7), 7),
    "run(seed)": (lambda d: lambda seed: euler(d, seed), 5),
    "run(i)": (lambda d: lambda i: euler(d, i), 5),
    "run(denoiser)": (lambda d: lambda denoiser: euler(denoiser), 0),
    "run(denoiser, seed)": (lambda d: lambda denoiser, seed: euler(denoiser, seed), 5),
    "run(denoiser, seed=)": (lambda d: euler, 5),
    "run(d, s)": (lambda d: lambda d, s: euler(d, s), 5),
    "run(d, s, /)": (lambda d: lambda d, s, /: euler(d, s), 5),
    "run(steps=, seed=)": (lambda d: lambda steps=STEPS, seed=0: euler(d, seed, steps), 5),
    "run(pipe, steps=)": (lambda d: lambda pipe, steps=STEPS, seed=0: euler(pipe, seed, steps), 5),
    "run(*, seed)": (lambda d: lambda *, seed: euler(d, seed), 5),
    "run(*args)": (lambda d: lambda *args, **kwargs: euler(d, len(args) + len(kwargs)), 0),
    "default": (lambda d: lambda denoiser=d: euler(denoiser), 0),
    "partial": (lambda d: functools.partial(euler, d), 5),
    "partial by name": (lambda d: functools.partial(euler, denoiser=d), 5),
    "method": (lambda d: Sampling(denoiser=d).method, 5),
    "other order": (lambda d: Sampling().other_order, 5),
    "callable": (lambda d: Sampling(), 5),
}


def test_forms_of_run(model):
    denoiser = fxcache.transform(model, disable=True)
    for form, (make, seed) in FORMS.items():
        run = make(denoiser)
        bound = arguments(run, denoiser, denoiser, 5)
        result = run(*bound.args, **bound.kwargs)
        assert torch.equal(result, euler(model, seed)), form


def test_a_plain_model_is_handed_over_whatever_the_argument_is_called(model):
    result, computed = called(model, lambda network: euler(network))
    assert computed == STEPS
    assert torch.equal(result, euler(model))
    assert called(model, lambda network, seed=1: euler(network, seed))[1] == STEPS


def test_runs_and_targets_that_do_not_fit(model):
    for run, message in (
        ("sample", "run must be a function that samples, got 'sample'"),
        (dict, "run must have a signature"),
        (lambda: None, "run must take the denoiser as its argument where a Small"),
        (lambda seed: None, "run must take the denoiser"),
        (lambda pipe, prompt, height: None, "at most two arguments"),
        (lambda pipe, prompt, seed: None, "at most two arguments"),
    ):
        with pytest.raises(OptionError, match=message):
            called(model, run)
    for target in ("transformer", None, SimpleNamespace(unet=None), object()):
        with pytest.raises(OptionError, match="must have one denoiser"):
            called(target, lambda pipe: None)


def test_components_of_something_like_a_pipeline(model, denoiser):
    pipe = SimpleNamespace(transformer=model, transformer_2=denoiser, scheduler=None)

    def run(pipe, seed):
        names.append((pipe.transformer is model, pipe.transformer_2 is denoiser))
        return euler(pipe.transformer, seed) + euler(pipe.transformer_2, seed)

    names = []
    with pytest.raises(OptionError, match=r"got .'transformer', 'transformer_2'.; with"):
        called(pipe, run)
    for component, expected in (("transformer", (False, True)), ("transformer_2", (True, True))):
        profile = fxcache.calibrate(pipe, run, component=component, runs=1, progress=False)
        assert profile.num_steps == STEPS
        assert names.pop() == expected
        assert pipe.transformer is model
        assert pipe.transformer_2 is denoiser
    with pytest.raises(OptionError, match="got none"):
        fxcache.calibrate(pipe, run, component="unet", progress=False)


def test_generators_are_seeded_and_restored(denoiser):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    numbers = [called(denoiser, lambda: torch.rand(3), seed=seed)[0] for seed in (3, 3, 4)]
    assert torch.equal(numbers[0], torch.rand(3, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert called(denoiser, lambda: None)[1] == 0


def test_a_run_that_resets_the_denoiser_and_one_with_gradients(denoiser, caplog):
    def run(seed):
        denoiser.reset()
        euler(denoiser, seed)
        denoiser.reset()

    assert called(denoiser, run)[1] == STEPS
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "fxcache"):
        assert called(denoiser, euler.__wrapped__)[1] == 0
    assert "gradients are enabled: nothing is cached" in caplog.text


def test_a_unet_in_a_pipeline(model):
    diffusers = pytest.importorskip("diffusers")

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, steps, generator):
            self.scheduler.set_timesteps(steps)
            x = torch.randn(1, 8, 4, generator=generator)
            for t in self.scheduler.timesteps:
                v = self.unet(x, t.expand(1) / 1000)
                x = self.scheduler.step(v, t, x).prev_sample
            return diffusers.utils.BaseOutput(images=x)

    pipe = Pipeline(model, diffusers.DDIMScheduler())
    config = dict(pipe.config)
    tune = functools.partial(
        fxcache.tune, max_computed_steps=2, frontier=(), sensitivity_steps=0, verify_runs=1,
        progress=False,
    )  # fmt: skip

    def run(pipe, seed):
        return pipe(4, torch.Generator().manual_seed(seed))

    result = tune(pipe, run)
    assert pipe.unet is model
    assert dict(pipe.config) == config
    assert result.policy.origin.model_classes == ("Small",)
    assert "DDIMScheduler, 4 steps" in result.policy.origin.source
    assert result.point.computed_steps == 2

    def broken(pipe, seed):
        assert pipe.unet is not model
        raise RuntimeError("out of memory")

    with pytest.raises(ProfileError, match="RuntimeError with seed 0: out of memory"):
        tune(pipe, broken)
    assert pipe.unet is model


def test_results_of_every_kind():
    pil = pytest.importorskip("PIL.Image")
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    picture, values = pil.fromarray(pixels), torch.arange(24, dtype=torch.float64) / 255
    assert torch.equal(as_tensor(pixels).flatten(), values)
    assert torch.equal(as_tensor(picture).flatten(), values)
    assert torch.equal(as_tensor([picture, picture]), values.repeat(2))
    assert torch.equal(as_tensor([[picture], [picture]]), values.repeat(2))
    assert torch.equal(as_tensor(torch.from_numpy(pixels)).flatten(), values)
    assert torch.equal(as_tensor(([picture], None)), values)  # return_dict=False
    assert torch.equal(as_tensor({"a": {"images": [picture]}, "nsfw": None}), values)
    for name in ("images", "frames", "audios", "sample"):
        assert torch.equal(as_tensor(SimpleNamespace(**{name: [picture]})), values)
    half = torch.ones(2, 3, dtype=torch.bfloat16).requires_grad_()
    assert as_tensor(half).dtype == torch.float64
    assert as_tensor(half).shape == (2, 3)
    assert not as_tensor(half).requires_grad
    assert as_tensor(0.5) == 0.5
    with torch.inference_mode():
        result = as_tensor(torch.ones(2) / 2)
    assert psnr(result, result + 0.1) == pytest.approx(20)


def test_results_that_are_no_samples():
    for result in (None, "picture", [], (None,), {}, object(), [object()]):
        with pytest.raises(ProfileError, match="run must return what was sampled"):
            as_tensor(result)


def test_psnr():
    zeros, ones = torch.zeros(4).double(), torch.ones(4).double()
    assert psnr(zeros + 0.1, zeros) == pytest.approx(20)
    wide = torch.tensor([-2.0, 2.0, 0.0, 0.0]).double()  # a range of 4
    assert psnr(wide + 0.4, wide) == pytest.approx(20)
    for same in (zeros, ones, wide, 5 * ones):
        assert psnr(same.clone(), same) == math.inf
    for value in (math.nan, math.inf):
        assert psnr(ones * value, wide) == -math.inf
    assert psnr(6 * ones, 5 * ones) == -math.inf
